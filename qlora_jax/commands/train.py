"""Fine-tune a language model with QLoRA.

python scripts/train.py                                   SmolLM2-135M on the instructions that ship with qlora_jax
python scripts/train.py --model meta-llama/Llama-3.1-8B-Instruct --data my.jsonl --output runs/mine
python scripts/train.py --config run.toml
srun python scripts/train.py --config run.toml            one run over all processes (docs/hosts.md)
"""

from collections.abc import Sequence

from qlora_jax import cli, cluster
from qlora_jax.finetune import Options, finetune
from qlora_jax.finetune.folder import saved_work

__all__ = ["Options", "main"]


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command and return its exit code."""
    return cluster.run_joined(lambda: cli.run(finetune, Options, __doc__, arguments, program=program, saved=saved_work))
