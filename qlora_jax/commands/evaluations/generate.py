"""Answer the questions of a file with a model, with or without an adapter, for a judge.

    python scripts/evaluate.py generate --questions vicuna_questions.jsonl --output base.jsonl
    python scripts/evaluate.py generate --questions vicuna_questions.jsonl --output mine.jsonl --adapter runs/mine/adapter

The questions have one of the columns prompt, question, text, instruction and messages; a .txt file has one a line. Several
questions are answered at a time. Each answer is one line {"question_id", "model", "prompt", "answer", …} of the output, and
is written at once: the same command continues a file that was interrupted. Sampling is that of the QLoRA paper unless the
options say otherwise: temperature 0.7, nucleus 0.9. The last line on stdout is JSON.
"""

import dataclasses
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from tqdm import tqdm

from qlora_jax import cli
from qlora_jax.adapters.pretrained import Pretrained, PretrainedOptions
from qlora_jax.commands.evaluations.output import check_least, print_json
from qlora_jax.commands.generate import PromptOptions, choose_template
from qlora_jax.data import Template, check_ids, encode_prompt
from qlora_jax.errors import DataError, OptionError
from qlora_jax.evaluate import AnswerFile, Prompt, read_prompts
from qlora_jax.models import CausalLM, causal_family_of, positions_left
from qlora_jax.serve import Sampling
from qlora_jax.serve.engine import Engine
from qlora_jax.serve.offline import Answered, answer_all
from qlora_jax.serve.request import Choices, Request
from qlora_jax.serve.scheduler import Limits


@dataclasses.dataclass(frozen=True)
class AnsweringOptions:
    """Options of the questions and their answers."""

    questions: str | None = None
    """File of questions."""
    output: Path | None = None
    """File of answers to write or to continue (JSONL)."""
    name: str | None = None
    """Name of the model in the file; that of the adapter or the model if left out."""
    limit: int | None = None
    """Number of questions to answer, the first ones; all of them if left out."""
    system: str | None = None
    """System message, for templates that have one."""
    template: Template | None = None
    """Template of the prompts; if left out, that of the adapter's training, else the chat template if there is one."""
    chat_template: str | None = None
    """Chat template: a Jinja file or a name, in place of that of the adapter or the model."""
    max_new_tokens: int = 1024
    """Maximum number of tokens of an answer."""
    seed: int = 0
    """Seed of the sampling. The draws of an answer depend on it and on the question alone."""
    rows: int = 8
    """Number of questions that are answered at a time."""

    def __post_init__(self) -> None:
        check_least(self, limit=1, max_new_tokens=1, seed=0, rows=1)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command."""

    model: PretrainedOptions = dataclasses.field(default_factory=PretrainedOptions)
    answers: AnsweringOptions = dataclasses.field(default_factory=AnsweringOptions)
    sampling: Sampling = dataclasses.field(default_factory=lambda: Sampling(temperature=0.7, top_p=0.9))


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.run(generate, Options, __doc__, arguments, program=program, saved=saved_work)


def saved_work(options: Options) -> str:
    """Return what is saved, for the message of an interruption."""
    return f"complete answers are in {options.answers.output}; the same command answers the other questions"


def generate(options: Options) -> None:
    """Answer the questions that have no answer yet."""
    asked = options.answers
    if asked.questions is None:
        raise OptionError("--questions: expected a file of questions, found none")
    if asked.output is None:
        raise OptionError("--output: expected a file for the answers, found none")
    prompts = read_prompts(asked.questions)
    pretrained = options.model.open()
    causal_family_of(pretrained.checkpoint.config)  # raises for an encoder-decoder
    template = choose_template(PromptOptions(template=asked.template, chat_template=asked.chat_template), pretrained)
    file = AnswerFile(asked.output, name_of(pretrained, asked.name), prompts, settings_of(options, pretrained, template))
    tokens = {prompt.question_id: prompt_tokens(prompt, pretrained, template, asked) for prompt in prompts[: asked.limit]}
    requests = {
        question_id: request_for(question_id, ids, options, pretrained.stop_ids)
        for question_id, ids in tokens.items()
        if question_id not in file.answered
    }
    print(f"{asked.questions}: {len(tokens):,} questions, {len(requests):,} without an answer", file=sys.stderr)
    if requests:
        answer(pretrained, requests, file, asked.rows)
    file.finish()
    rows = file.rows()
    lengths = [row.get("tokens", 0) for row in rows]
    cut, empty = sum(row.get("finish") == "length" for row in rows), sum(not row["answer"] for row in rows)
    print(f"{asked.output}: {len(rows):,} answers, {np.mean(lengths):.0f} tokens on average, {cut:,} cut at the limit")
    summary = {"answers": len(rows), "tokens": sum(lengths), "cut": cut, "empty": empty}
    print_json({"generate": {"model": name_of(pretrained, asked.name), "output": str(asked.output), **summary}})


def answer(pretrained: Pretrained, requests: dict[int | str, Request], file: AnswerFile, rows: int) -> None:
    """Load the model and write its answers to requests."""
    model = pretrained.load(progress=sys.stderr.isatty())
    assert isinstance(model, CausalLM)
    capacity = max(len(request.prompt) + request.max_new_tokens for request in requests.values())
    engine = Engine(
        *nnx.split(model),
        limits=Limits(rows=min(rows, len(requests)), capacity=max(2, capacity)),
        vocabulary=pretrained.checkpoint.model_config.vocab_size,
        tokenizer=pretrained.tokenizer,
    )
    found: Answered
    with tqdm(total=len(requests), desc="answering", unit="answer", disable=not sys.stderr.isatty()) as bar:
        for question_id, found in answer_all(engine, requests):
            file.add(question_id, found.text.strip(), tokens=len(found.tokens), finish=found.finish)
            bar.update()


def request_for(question_id: int | str, prompt: list[int], options: Options, stop_ids: frozenset[int]) -> Request:
    """Return the request for a question, with a seed of its own, so that its answer does not depend on the others."""
    sampling = options.sampling
    seed = zlib.crc32(f"{options.answers.seed}/{question_id}".encode())
    choices = Choices(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, seed=seed)
    return Request(tuple(prompt), options.answers.max_new_tokens, choices, eos_ids=stop_ids)


def prompt_tokens(prompt: Prompt, pretrained: Pretrained, template: Template, options: AnsweringOptions) -> list[int]:
    """Return the tokens of a question.

    Raises:
        DataError: the template cannot write it, or it is too long together with its answer.
    """
    messages = list(prompt.messages)
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    config, place = pretrained.checkpoint.model_config, f"{options.questions}, question {prompt.question_id!r}: "
    try:
        ids = encode_prompt(messages, pretrained.tokenizer, template=template)
    except DataError as error:
        raise DataError(f"{place}{error}") from error
    check_ids(ids, pretrained.tokenizer, config.vocab_size, place)
    room = positions_left(config, pretrained.method)
    if room is not None and len(ids) + options.max_new_tokens > room:
        raise DataError(
            f"{place}expected at most {room:,} tokens with the answer, found {len(ids):,} and {options.max_new_tokens:,} "
            "for the answer (max_new_tokens)"
        )
    return ids.tolist()


def name_of(pretrained: Pretrained, name: str | None) -> str:
    """Return the name of a model in a file: the given one, else that of the adapter's run or folder, else the base's."""
    if name is not None:
        return name
    if pretrained.adapter is None:
        return Path(pretrained.base.name).name
    path = (
        Path(pretrained.adapter.name).resolve() if Path(pretrained.adapter.name).exists() else Path(pretrained.adapter.name)
    )
    return path.parent.name if path.name == "adapter" else path.name


def settings_of(options: Options, pretrained: Pretrained, template: Template) -> dict[str, Any]:
    """Return all that decides the answers, as JSON can hold it."""
    stored, adapter, asked = pretrained.quantization, pretrained.adapter, options.answers
    return {
        "base": Path(pretrained.base.name).name,
        "commit": pretrained.base.commit,
        "adapter": None if adapter is None else checksum_of(adapter.tensors),
        "storage": None if stored is None else dataclasses.asdict(stored),
        "embedding_storage": pretrained.embedding_storage,
        "dtype": np.dtype(pretrained.dtype).name,
        "template": template,
        "chat_template": asked.chat_template,
        "system": asked.system,
        "max_new_tokens": asked.max_new_tokens,
        **dataclasses.asdict(options.sampling),
        "seed": asked.seed,
    }


def checksum_of(tensors: Any) -> str:
    """Return the checksum of an adapter's values, by which one that was trained on is told from what it was before."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(np.ascontiguousarray(tensors[name]).tobytes(), zlib.crc32(name.encode(), total))
    return f"{total:08x}"
