"""One run of a comparison: train, then measure. Each run is a separate process, so that its peak memory can be measured.

scripts/studies/compare.py calls this module with the flags of train.py; the last printed line is the result as JSON.
"""

import json
import math
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.adapters.pretrained import open_pretrained
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.cli import parse
from qlora_jax.data import encode_all, load_records
from qlora_jax.finetune import Options, finetune
from qlora_jax.finetune.objectives.answers import greedy
from qlora_jax.finetune.step import step_spec
from qlora_jax.train import build_step

LONGEST = 4096  # maximum number of tokens of a held-out record that is answered


def main(answers: str, *flags: str) -> None:
    """Run one cell and print its result; `answers` is the number of held-out prompts to answer."""
    options, count = parse(Options, description=None, arguments=flags), int(answers)
    start = time.perf_counter()
    folder = finetune(options, progress=sys.stderr.isatty())
    seconds = time.perf_counter() - start
    rows = [json.loads(line) for line in (options.run.output / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    result: dict[str, Any] = {
        "figures": json.loads((options.run.output / "eval_results.json").read_text()),
        "trainable_parameters": trainable_parameters(options),
        "checkpoint_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in steps),
        # The first step compiles.
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in steps[1:] or steps),
        "final_training_loss": statistics.fmean(row["loss"] for row in steps[-10:]),
        "seconds": seconds,
        "steps": len(steps),
    }
    if count:
        result["figures"]["eval_exact_match"] = exact_match(options, folder, count)
    print(json.dumps(result))


def trainable_parameters(options: Options) -> int:
    """Return the number of trainable parameters of a run."""
    checkpoint = open_checkpoint(str(options.model.model), options.model.revision)
    step = build_step(step_spec(options, checkpoint.model_config, jax.default_backend()))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(step.state.adapter))


def exact_match(options: Options, folder: Path, count: int) -> float:
    """Return the share of the first `count` held-out prompts whose greedy answer has the expected end."""
    whole = (folder / "config.json").is_file()  # a model, not an adapter
    tuned = open_pretrained(folder) if whole else open_pretrained(options.model.model, folder)
    assert options.data.eval_data is not None
    records = load_records(options.data.eval_data)
    records = records.select(range(min(count, len(records))))
    # Encoded as in the run, but with a larger maximum length: expected answers must not be truncated.
    examples, _ = encode_all(
        records, tokenizer=tuned.tokenizer, max_length=LONGEST, template=options.data.template, progress=False
    )
    starts = [int(np.flatnonzero(example.loss_mask)[0]) for example in examples]
    prompts = [example.tokens[:start] for example, start in zip(examples, starts, strict=True)]
    expected = [example.tokens[start:] for example, start in zip(examples, starts, strict=True)]
    found = greedy(tuned.load(progress=False), prompts, eos_ids=tuned.stop_ids, max_new_tokens=max(map(len, expected)))

    def ending(tokens: Any) -> str:
        return final_answer(str(tuned.tokenizer.decode(np.asarray(tokens), skip_special_tokens=True)))

    hits = [ending(answer) == ending(wanted) for answer, wanted in zip(found, expected, strict=True)]
    return sum(hits) / len(hits)


def final_answer(text: str) -> str:
    """Return the text after the last ####, which marks answers in GSM8K, without commas; else the whole text, stripped."""
    match = re.findall(r"####\s*(\S[^\n]*)", text)
    return match[-1].strip().rstrip(".").replace(",", "") if match else text.strip()


if __name__ == "__main__":
    main(*sys.argv[1:])
