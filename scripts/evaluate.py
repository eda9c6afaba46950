"""Measure models: MMLU, relative scores, Elo ratings, and the agreement of judges.

The command is in qlora_jax/commands/evaluate.py, its sub-commands in qlora_jax/commands/evaluations/.
"""

import sys

from qlora_jax.commands import run_script

if __name__ == "__main__":
    sys.exit(run_script("evaluate"))
