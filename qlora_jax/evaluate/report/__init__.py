"""A report of evaluations as one HTML file.

sources.py reads the files, sections.py and results.py arrange what is in them, page.py and pictures.py write it.
"""

from qlora_jax.evaluate.report.page import page
from qlora_jax.evaluate.report.sections import sections_of
from qlora_jax.evaluate.report.sources import Sources, read_sources

__all__ = ["Sources", "page", "read_sources", "sections_of"]
