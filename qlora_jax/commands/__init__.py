"""The commands of the package. `scripts/NAME.py` and the console command `qlora-jax NAME` run the same function.

    qlora-jax                     list the commands
    qlora-jax train --help        the options of one command
    qlora-jax train --model …     run it

Each command is a module of this package with a dataclass of its options and a `main` that returns an exit code. Only the
module of the chosen command is imported, after Ctrl-C and SIGTERM are taken care of.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

from qlora_jax.cluster import detect
from qlora_jax.interrupts import end_while_importing

_SEVERAL_PROCESSES = ("train", "plan")  # a run over all of them; and the compilers, which start no devices

__all__ = ["COMMANDS", "choose", "main", "run_script"]

COMMANDS = {
    "train": "fine-tune a language model with QLoRA",
    "train_many": "train the adapters of many tenants at once over one frozen base",
    "generate": "ask a model, with or without an adapter",
    "chat": "chat with a model and its adapters in the terminal",
    "serve": "serve a model and many adapters over OpenAI's API",
    "merge": "merge an adapter into its base model and write a Hugging Face folder",
    "evaluate": "measure models: perplexity, MMLU, and the judgements of their answers",
    "plan": "compile a step for devices that need not be attached, and show what it needs",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names and return its exit code.

    Args:
        arguments: the command line without the name of the program; `sys.argv` if None.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and not _may_start(given[0]):
        return 1
    return choose(COMMANDS, given, program="qlora-jax", package="qlora_jax.commands")


def choose(commands: Mapping[str, str], arguments: Sequence[str], *, program: str, package: str) -> int:
    """Run the command that the first argument names and return its exit code; without arguments, list the commands.

    Args:
        commands: what each command does, by its name.
        arguments: the name and the command line of the command.
        program: name of the program in messages.
        package: the package whose modules the commands are.
    """
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, commands))
        print(f"usage: {program} NAME [OPTIONS]\n")
        print("\n".join(f"  {command:{width}}  {text}" for command, text in commands.items()))
        print(f"\n`{program} NAME --help` shows the options of a command; --config FILE.toml sets them.")
        return 0
    if name not in commands:
        print(f"error: unknown command {name!r}: expected one of {', '.join(commands)}", file=sys.stderr)
        return 2
    return _module(f"{package}.{name}").main(rest, program=f"{program} {name}")


def run_script(name: str) -> int:
    """Run a command with the arguments of this process, as scripts/NAME.py does, and return its exit code."""
    return _module(f"qlora_jax.commands.{name}").main() if _may_start(name) else 1


def _may_start(name: str) -> bool:
    """Return whether a command may start; print the reason where a launcher has started several processes of it.

    They would each do the same work and write to the same files, and on a TPU slice wait for each other.
    """
    if name not in COMMANDS or name in _SEVERAL_PROCESSES or (cluster := detect()) is None:
        return True
    print(f"error: {name}: expected one process, found {cluster}; only train runs over several processes", file=sys.stderr)
    return False


def _module(name: str) -> ModuleType:
    """Import the module of a command by its full name, which takes seconds."""
    end_while_importing()
    return importlib.import_module(name)
