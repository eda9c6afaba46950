"""The parts of scripts/studies/measure_long_context.py: the texts and the page."""
