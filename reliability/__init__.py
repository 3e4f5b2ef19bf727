"""What happens when things break: faults and load against a real gateway process, with a table.

Not installed. ``python -m reliability --help`` says what there is; ``docs/reliability.md``
holds the result.
"""
