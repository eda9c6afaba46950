"""What scripts/measure_long_context.py is made of: the texts, and the page."""
