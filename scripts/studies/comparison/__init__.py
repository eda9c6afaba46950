"""What scripts/studies/compare.py is made of."""
