"""Compile a step for devices that need not be attached, and show what it needs.

The command is in qlora_jax/commands/plan.py.
"""

import sys

from qlora_jax.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
