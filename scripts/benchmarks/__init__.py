"""Benchmarks: programs that measure speed, memory and compiled programs, for the pages of docs/.

From the root of a clone, `python scripts/benchmarks/NAME.py` runs one; `python -m scripts.benchmarks.NAME` does the same.
"""
