"""Agents on well-known client libraries, pointed at driftgate by base URL and key alone."""
