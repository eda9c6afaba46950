"""Compile a step for devices that need not be attached, and show what it needs.

The command is in qlora_jax/commands/plan.py.
"""

import sys

from qlora_jax.commands import run_script

if __name__ == "__main__":
    sys.exit(run_script("plan"))
