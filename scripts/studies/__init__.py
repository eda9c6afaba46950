"""Studies: programs that answer a question with many runs or models, for the pages of docs/.

From the root of a clone, `python scripts/studies/NAME.py` runs one; `python -m scripts.studies.NAME` does the same.
"""
