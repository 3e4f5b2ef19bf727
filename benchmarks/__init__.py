"""Benchmarks: each prints the machine, its command, and ratios against something known."""
