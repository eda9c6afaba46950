"""The sub-commands of `evaluate`, one module each: a dataclass of its options and a `main` that returns an exit code.

The figures themselves are made in `qlora_jax.evaluate`. Every sub-command prints a table and, on the last line, JSON; all
else is printed on stderr.
"""
