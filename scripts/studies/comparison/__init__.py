"""The parts of scripts/studies/compare.py: the grid, one run, intervals and the report."""
