"""Fine-tune a language model with QLoRA.

The command is in qlora_jax/commands/train.py.
"""

import sys

from qlora_jax.commands import run_script

if __name__ == "__main__":
    sys.exit(run_script("train"))
