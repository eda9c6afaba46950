"""The parts of scripts/studies/datatypes.py: what is measured, what of it is kept, and the page."""
