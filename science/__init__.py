"""Every number of the trainer's side against a reference that shares no code with it.

``python -m science`` measures all of it in one run and prints one table. Not installed.
"""
