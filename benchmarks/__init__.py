"""Measurements, each a module to run: `python -m benchmarks.<name> --json`. Tests live elsewhere and assert no times."""
