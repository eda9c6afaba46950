"""The parts of scripts/studies/datatypes.py: measurements, the journal of finished cells, the summary and the page."""
