"""`python -m qlora_jax.commands NAME` is `qlora-jax NAME`, for a checkout that is not installed."""

import sys

from qlora_jax.commands import main

if __name__ == "__main__":
    sys.exit(main())
