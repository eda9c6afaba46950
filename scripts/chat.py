"""Chat with a model and its adapters in the terminal.

The command is in qlora_jax/commands/chat.py.
"""

import sys

from qlora_jax.commands import run_script

if __name__ == "__main__":
    sys.exit(run_script("chat"))
