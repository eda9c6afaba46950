"""Merge an adapter into its base model and write a Hugging Face folder.

The command is in qlora_jax/commands/merge.py.
"""

import sys

from qlora_jax.commands import run_script

if __name__ == "__main__":
    sys.exit(run_script("merge"))
