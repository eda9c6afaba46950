"""The parts of scripts/benchmarks/bench.py: a module for each task, processes that take turns, and tables."""
