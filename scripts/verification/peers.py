"""transformers + PEFT + bitsandbytes on the same GPU, beside qlora_jax with the same weights, tokens and options.

Both run as the workers of scripts/benchmarks/bench.py, in processes of their own: SmolLM2-135M-Instruct in NF4, bfloat16,
layers recomputed, LoRA of rank 16, 4 x 512 tokens. bench.py compares in more ways and for longer.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax

from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import CheckpointError
from qlora_jax.export.merge import merge
from scripts.benchmarks import training
from scripts.benchmarks.workers import OURS, Peer, find_python, run_worker
from scripts.verification.checks import Check, Row, Skipped, measured
from scripts.verification.workloads import fetched_model

PEER = Peer("hf", ("torch", "transformers", "peft", "bitsandbytes", "accelerate"), cuda=True)
_WORK = {"batch_size": 4, "length": 512, "rank": 16, "steps": 8, "warmup": 2}
_NAMES = {OURS: "qlora_jax", PEER.name: "transformers + PEFT + bitsandbytes"}


def checks(small: bool) -> list[Check]:
    """Return the one check of this section."""
    return [Check(tuple(_NAMES.values()), partial(_compare, small))]


def _compare(small: bool) -> Iterator[Row]:
    if small:
        raise Skipped("peers run on a GPU and without --small")
    python, reason = find_python(PEER, (Path(sys.executable),))
    if python is None:
        raise Skipped(reason)
    jax.config.update("jax_platforms", "cpu")  # of this process: the GPU's memory is for the workers
    with tempfile.TemporaryDirectory(prefix="verify-") as temporary:
        try:
            checkpoint = open_checkpoint(str(fetched_model()))
        except CheckpointError as error:
            raise Skipped(f"the model cannot be fetched ({error})") from error
        folder = merge(checkpoint, None, Path(temporary) / "checkpoint", dtype="bfloat16", progress=False)
        tokens = _WORK["batch_size"] * _WORK["length"]
        variants: dict[str, Sequence[str]] = {OURS: ("bfloat16-full",), PEER.name: ("bfloat16-checkpointing",)}
        for run in training.runs_of(folder, variants, {OURS: python, PEER.name: python}, **_WORK):
            try:
                found = training.summary([run_worker(run.command, "default")], tokens, "default")
            except ValueError as error:
                if run.side == OURS:
                    raise
                raise Skipped(f"the peer stopped: {str(error).strip().splitlines()[-1][:200]}") from error
            memory = found["peak_device_bytes"]
            text = f"{found['tokens_per_second']:,.0f} tokens/s, peak "
            text += "unknown" if memory is None else f"{memory / 2**30:.2f} GiB"
            yield measured(_NAMES[run.side], text, **found)
