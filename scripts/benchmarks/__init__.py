"""The benchmarks behind the figures of docs/, and the parts of bench.py: one module for each task, workers, and pages."""
