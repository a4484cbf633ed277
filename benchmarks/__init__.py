"""Benchmarks: `python -m benchmarks NAME` writes a table and a JSON file into benchmarks/results/."""
