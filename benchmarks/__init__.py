"""Measurements: see ``docs/benchmarks.md``. Nothing here is installed with the package."""
