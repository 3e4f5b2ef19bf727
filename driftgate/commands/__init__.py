"""The commands of ``driftgate``, one file for those that belong together; ``driftgate.cli`` lists
them."""
