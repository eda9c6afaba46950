"""Train the adapters of many tenants at once over one frozen base.

The command is in qlora_jax/commands/train_many.py.
"""

import sys

from qlora_jax.commands import run_script

if __name__ == "__main__":
    sys.exit(run_script("train_many"))
