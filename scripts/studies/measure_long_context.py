"""Measure retrieval beyond the context of a model, after training with shifted sparse attention (LongLoRA).

    python scripts/studies/measure_long_context.py                         SmolLM2-135M, 8192 to 16384 positions
    python scripts/studies/measure_long_context.py --real 3 --output docs/long-context.md

A key of five digits is hidden in filler text, and the end of the text asks for it. The recipe is that of LongLoRA (Chen et
al. 2023): the base in NF4 with double quantisation, LoRA on all linear layers, trained token embedding and norms, positions
divided by `extended` / context, and, in training, attention in 4 groups of a row with half of the heads shifted by half a
group. Evaluation uses dense attention: each token attends to all tokens before it.

A step on rows of 16384 tokens takes minutes on a CPU, so that most texts here are short and their positions have gaps, as in
PoSE (Zhu et al. 2023): the skipped positions are distributed at random over the starts of the sentences, most of them over a
few. A query of S²-Attn attends to one group only. Therefore every training row packs many short documents, at any position
relative to the borders of groups, and each document asks for its own key: at most half a group of tokens after the key, so
that at least half of the heads can see it, but up to `extended` positions. The loss is that of the digits of the answers,
and of all other tokens with a small weight.

    within, beyond    prompts of `length` tokens with one key, whose last position is drawn from the upper half of the
                      context, or from the range between the context and `extended`
    real              prompts of `extended` tokens without gaps, which are read in chunks through the cache; the answers are
                      decoded

An answer is right if all digits are the most likely ones, as in greedy decoding. The filler is made of sentences of the
default data, in evaluation of other sentences than in training. Three models get the same prompts: the untuned one, the
untuned one with divided positions, and the tuned one. Shares have Wilson's 95 % intervals, pairs have an exact test. The
last line is JSON. The details are in scripts/studies/long_context/.
"""

import dataclasses
import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from tqdm import tqdm

from qlora_jax import cli
from qlora_jax.adapters.metadata import with_scaling
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.errors import OptionError
from qlora_jax.finetune.options.context import ContextOptions
from qlora_jax.models import KVCache, causal_family_of, unscaled_context
from qlora_jax.peft import LoRA
from qlora_jax.train import create_state, jit_train_step, language_model_loss, learning_rate_schedule, optimizer, split
from scripts.benchmarks.page import command_line
from scripts.benchmarks.workers import cores
from scripts.studies.long_context.page import markdown, table
from scripts.studies.long_context.texts import DIGITS, Prompt, Writer, answers

CHUNK = 256  # tokens that are read at once: few, so that their scores fit into the caches of a CPU
GROWTH = 16 * CHUNK  # the cache is enlarged by so many slots at a time, because every chunk attends to all slots
Parts = tuple[Any, Any, Any]  # the graph of a model, its trainable parameters, and the rest


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of training and evaluation."""

    model: str | None = None
    """Folder, .gguf file or hub id of the model; SmolLM2-135M-Instruct if left out."""
    extended: int = 16384
    """Number of positions after the extension."""
    length: int = 1024
    """Tokens in a row whose positions have gaps."""
    steps: int = 100
    """Training steps, of one row each."""
    learning_rate: float = 3e-4
    """Maximum learning rate of LoRA's A and of the token embedding."""
    loraplus_lr_ratio: float = 8.0
    """Ratio of the learning rate of LoRA's B and of the norms to the one above."""
    rank: int = LoRA.rank
    """Rank of the adapter."""
    prompts: int = 40
    """Number of prompts with gaps within the context, and of those beyond it."""
    real: int = 0
    """Number of prompts of `extended` tokens without gaps."""
    seed: int = 0
    """Seed of all random choices."""
    output: Path | None = None
    """Markdown file to write; if left out, the page is only printed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.run(run, Arguments, __doc__, arguments)


def run(arguments: Arguments) -> None:
    """Measure, print the report and write the page."""
    report = measure(arguments)
    text = markdown(report)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
    print(json.dumps(report))


def measure(arguments: Arguments) -> dict[str, Any]:
    """Train, evaluate and return the report."""
    source = arguments.model or str(fetch_default_model())
    checkpoint, tokenizer = open_checkpoint(source), load_tokenizer(source)
    causal_family_of(checkpoint.config)  # raises for an encoder-decoder
    config: Any = checkpoint.model_config
    context, options = unscaled_context(config), ContextOptions(longlora=True)
    sentences = answers()
    learned, asked = sentences[: len(sentences) * 3 // 4], sentences[len(sentences) * 3 // 4 :]
    writer, reach = Writer(tokenizer, learned, arguments.seed), arguments.length // options.groups // 2
    check(arguments, context, reach, sum(map(len, writer.key())))
    prompts = draw_prompts(Writer(tokenizer, asked, arguments.seed + 1), arguments, context)
    load = partial(load_model, dtype=jnp.bfloat16, seed=arguments.seed)
    started = time.perf_counter()
    lora = options.with_trained_modules(LoRA(arguments.rank, 2.0 * arguments.rank), config)
    scaled = with_scaling(checkpoint, options.scaling(config, arguments.extended))
    remat = "dots" if jax.default_backend() == "cpu" else "full"
    tuned, losses = train(split(load(scaled, method=lora, remat=remat)), writer, arguments, options.groups, reach)
    seconds = {"training": time.perf_counter() - started}
    right = {"tuned": ask(tuned, prompts)}
    del tuned
    for name, untuned in {"untuned": checkpoint, "untuned, scaled": scaled}.items():
        right[name] = ask(split(load(untuned)), prompts)
    seconds["all"] = time.perf_counter() - started
    described = dataclasses.asdict(arguments) | {"output": None, "model": Path(source).name}
    return {
        "command": command_line("studies/measure_long_context.py"),
        "arguments": described,
        "context": context,
        "dtype": "bfloat16",
        "device": jax.devices()[0].device_kind,
        "cores": cores(),
        "versions": {package: importlib.metadata.version(package) for package in ("jax", "flax", "optax", "numpy")},
        "seconds": seconds,
        "losses": losses,
        "prompts": [{"kind": prompt.kind, "last": int(prompt.positions[-1]), "depth": prompt.depth} for prompt in prompts],
        "right": right,
        "rows": table(prompts, right),
    }


def check(arguments: Arguments, context: int, reach: int, key: int) -> None:
    """Raise OptionError for options with which nothing can be measured."""
    for name, least in (("steps", 2), ("prompts", 2), ("rank", 1), ("real", 0)):
        if (value := getattr(arguments, name)) < least:
            raise OptionError(f"--{name}: expected at least {least}, found {value}")
    if not arguments.length <= context < arguments.extended:
        found = f"{arguments.length} and {arguments.extended}"
        raise OptionError(
            f"--length, --extended: expected at most and above the model's context of {context}, found {found}"
        )
    if reach < key:
        raise OptionError(
            f"--length: expected at least {key * arguments.length // reach} for a key, found {arguments.length}"
        )


def draw_prompts(writer: Writer, arguments: Arguments, context: int) -> list[Prompt]:
    """Return the prompts of all kinds; the keys of real ones are distributed evenly."""
    draws, length = np.random.default_rng(arguments.seed), arguments.length
    ends = {"within": (max(context // 2, length - 1), context), "beyond": (context, arguments.extended)}
    return [
        *(
            writer.prompt(kind, length, int(draws.integers(*of)))
            for kind, of in ends.items()
            for _ in range(arguments.prompts)
        ),
        *(
            writer.prompt("real", arguments.extended, arguments.extended - 1, (number + 0.5) / arguments.real)
            for number in range(arguments.real)
        ),
    ]


def train(parts: Parts, writer: Writer, arguments: Arguments, groups: int, reach: int) -> tuple[Parts, list[float]]:
    """Return the tuned model and the loss of each step."""
    graph, adapter, frozen = parts
    schedule = learning_rate_schedule("cosine", arguments.learning_rate, arguments.steps, arguments.steps // 20)
    tx = optimizer("adamw", schedule, loraplus_lr_ratio=arguments.loraplus_lr_ratio)
    state = create_state(tx, adapter, arguments.seed)
    step = jit_train_step(graph, tx, partial(language_model_loss, attention_groups=groups), state)
    losses: list[float] = []
    with tqdm(range(arguments.steps), desc="training", unit="step") as bar:
        for _ in bar:
            row = writer.row(arguments.length, arguments.extended, reach)
            batch = {name: jnp.asarray(values)[None, None] for name, values in row.items()}
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
            bar.set_postfix(loss=f"{np.mean(losses[-10:]):.3f}")
    return (graph, state.adapter, frozen), losses


def ask(parts: Parts, prompts: Sequence[Prompt]) -> list[bool]:
    """Return, for each prompt, whether a model answers it with the key, by dense attention."""
    graph, adapter, frozen = parts

    @jax.jit
    def with_gaps(adapter: Any, frozen: Any, tokens: Array, positions: Array) -> Array:
        model = nnx.merge(graph, adapter, frozen)
        hidden = model.hidden(tokens[None, :-1], positions=positions[None, :-1])
        return model.logits(hidden[0, -DIGITS:]).argmax(-1)

    @partial(jax.jit, donate_argnums=4)
    def decode(adapter: Any, frozen: Any, tokens: Array, positions: Array, cache: KVCache) -> tuple[Array, KVCache]:
        logits, cache = nnx.merge(graph, adapter, frozen).decode(tokens[None], positions[None], cache)
        return logits[0].argmax(-1), cache

    def real(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        tokens, positions = tokens[:-DIGITS], positions[:-DIGITS]
        padding = -len(tokens) % CHUNK
        tokens, after = np.pad(tokens, (0, padding)), positions[-1:] + 1
        positions = np.pad(positions, (0, padding), constant_values=-1)
        cache, found = nnx.merge(graph, adapter, frozen).init_cache(1, 0), []
        for start in tqdm(range(0, len(tokens), CHUNK), desc="reading", unit="chunk", leave=False):
            cache = enlarged(cache, GROWTH) if start % GROWTH == 0 else cache
            here = slice(start, start + CHUNK)
            token, cache = decode(adapter, frozen, tokens[here], positions[here], cache)
            found = [int(token)]  # waits for the result, so that the progress bar is correct
        cache = enlarged(cache, CHUNK)
        for number in range(1, DIGITS):
            token, cache = decode(adapter, frozen, np.asarray(found[-1:], np.int32), after + number - 1, cache)
            found.append(int(token))
        return np.asarray(found)

    right = []
    for prompt in (bar := tqdm(prompts, desc="asking", unit="prompt")):
        if prompt.kind == "real":
            found = real(prompt.tokens, prompt.positions)
        else:
            found = with_gaps(adapter, frozen, prompt.tokens, prompt.positions)
        right.append(bool(np.array_equal(found, prompt.tokens[-DIGITS:])))
        bar.set_postfix(right=sum(right))
    return right


def enlarged(cache: KVCache, more: int) -> KVCache:
    """Return the cache with room for `more` further tokens."""
    slots = ((0, 0), (0, 0), (0, 0), (0, more), (0, 0))
    keys, values = jnp.pad(cache.keys, slots), jnp.pad(cache.values, slots)
    return KVCache(keys, values)


if __name__ == "__main__":
    sys.exit(main())
