"""The parts of scripts/datatypes.py: what is measured, what of it is kept, and the page."""
