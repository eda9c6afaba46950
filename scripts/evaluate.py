"""Measure a model, with or without an adapter, on MMLU.

The command is in qlora_jax/commands/evaluate.py.
"""

import sys

from qlora_jax.commands import run_script

if __name__ == "__main__":
    sys.exit(run_script("evaluate"))
