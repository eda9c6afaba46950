"""Ask a model, with or without an adapter.

The command is in qlora_jax/commands/generate.py.
"""

import sys

from qlora_jax.commands import run_script

if __name__ == "__main__":
    sys.exit(run_script("generate"))
