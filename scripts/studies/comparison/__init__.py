"""The parts of scripts/studies/compare.py."""
