"""The parts of scripts/bench.py: a module for each task, processes that take turns, and tables."""
