"""Serve a model and many adapters over OpenAI's API.

The command is in qlora_jax/commands/serve.py.
"""

import sys

from qlora_jax.commands import run_script

if __name__ == "__main__":
    sys.exit(run_script("serve"))
