"""Fine-tune a language model with QLoRA.

The command is in qlora_jax/commands/train.py.
"""

import sys

from qlora_jax.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
