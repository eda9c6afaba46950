"""The parts of scripts/studies/datatypes.py: measurements, the file of finished cells, and the page."""
