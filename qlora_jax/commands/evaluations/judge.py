"""Let a judge compare the answers of models, in both orders, and write its judgements for `score`, `elo` and `agreement`.

    python scripts/evaluate.py judge base.jsonl adapter.jsonl --endpoint http://localhost:8000/v1 --judge-model llama
    python scripts/evaluate.py judge base.jsonl adapter.jsonl --ask scores --key-variable OPENAI_API_KEY …
    python scripts/evaluate.py judge base.jsonl adapter.jsonl --local --model meta-llama/Llama-3.1-8B-Instruct

The files have a JSON object a line: question_id, model, prompt, answer. With --endpoint, any server of OpenAI's chat API is
asked, also serve.py. With --local, a model is loaded here, and its verdict is the most probable of the three. The
judgements are appended to --output one by one: a run that was stopped, in whatever way, asks only for what is missing when
it is started again. The last line is JSON.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import jax
import tyro
from flax import nnx
from tqdm import tqdm

from qlora_jax import cli
from qlora_jax.adapters.pretrained import PretrainedOptions
from qlora_jax.commands.evaluations.output import check_least, print_json, print_table
from qlora_jax.errors import OptionError
from qlora_jax.evaluate import Kind
from qlora_jax.evaluate.judge import (
    Comparison,
    Endpoint,
    Journal,
    Judging,
    Limits,
    Meter,
    Patience,
    Tally,
    ask_all,
    comparisons,
    encode_comparisons,
    endpoint_url,
    judge_messages,
    key_of,
    open_journal,
    read_answers,
    request_hash,
    verdict_log_probabilities,
)
from qlora_jax.models import causal_family_of, positions_left
from qlora_jax.nn import data_mesh

_MOST_REASONS = 5  # kinds of failures that are printed


@dataclasses.dataclass(frozen=True)
class AskingOptions:
    """Options of an endpoint."""

    endpoint: str | None = None
    """Address of an API like OpenAI's, up to /v1."""
    judge_model: str | None = None
    """Name of the judge at the endpoint; with --local, its name in the file, the model's own if left out."""
    key_variable: str | None = None
    """Environment variable that contains the key; if left out, no key is sent. The key itself is never an option."""
    max_tokens: int = 512
    """Maximum number of tokens of a reply."""
    length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Name of that limit in a request; the newer models of OpenAI take the second one only."""
    temperature: float | None = 0.0
    """Temperature of the replies; None leaves it to the endpoint."""
    timeout: float = 120.0
    """Seconds that a request may take in all."""
    attempts: int = 7
    """Maximum number of requests for a comparison."""
    concurrency: int = 8
    """Maximum number of requests at a time."""


@dataclasses.dataclass(frozen=True)
class LimitOptions:
    """Limits of a judge at an endpoint; what former runs used, by --output, counts too."""

    requests_per_minute: float | None = None
    """Maximum number of requests a minute."""
    token_limit: int | None = None
    """Maximum number of tokens of prompts and replies together."""
    cost_limit: float | None = None
    """Maximum cost, in the unit of the prices."""
    prompt_price: float | None = None
    """Price of a million tokens of prompts."""
    reply_price: float | None = None
    """Price of a million tokens of replies."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command."""

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Files of answers (JSONL) of two or more models."""
    output: Path = Path("judgements.jsonl")
    """File of judgements, to which those that are missing are appended."""
    ask: Kind = "verdicts"
    """What to ask for: which of two answers is better, or a score from 1 to 10 for each."""
    models: tuple[str, ...] = ()
    """Models to compare; all if left out."""
    reference: str | None = None
    """Model that the others are compared with; if left out, all pairs are compared."""
    local: bool = False
    """Judge by the probabilities of the three verdicts of a model that is loaded here (--model)."""
    batch_size: int = 4
    """Number of comparisons in a batch of the local judge."""
    max_length: int = 4096
    """Maximum number of tokens that the local judge reads; longer answers are shortened for it."""
    asking: AskingOptions = dataclasses.field(default_factory=AskingOptions)
    limits: LimitOptions = dataclasses.field(default_factory=LimitOptions)
    model: PretrainedOptions = dataclasses.field(default_factory=PretrainedOptions)

    def __post_init__(self) -> None:
        check_least(self, batch_size=1, max_length=256)
        check_least(self.asking, max_tokens=1, attempts=1, concurrency=1)
        check_least(self.limits, token_limit=1)
        positive = {
            "timeout": self.asking.timeout,
            "requests_per_minute": self.limits.requests_per_minute,
            "cost_limit": self.limits.cost_limit,
        }
        for name, value in positive.items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise OptionError(f"{name}: expected a positive number, found {value}")
        not_negative = {
            "temperature": self.asking.temperature,
            "prompt_price": self.limits.prompt_price,
            "reply_price": self.limits.reply_price,
        }
        for name, value in not_negative.items():
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise OptionError(f"{name}: expected a number from 0, found {value}")


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.run(judge, Options, __doc__, arguments, program=program, saved=_saved)


def judge(options: Options) -> int:
    """Ask for the missing judgements and print how they ended; return 1 if a limit stopped the run before the end."""
    if not options.files:
        raise OptionError("judge: expected files of answers, found none")
    _check(options)
    endpoint = None if options.local else _endpoint(options.asking)
    found, notes = comparisons(read_answers(options.files), options.models, options.reference)
    if notes:
        print(*notes, sep="\n", file=sys.stderr)
    with open_journal(options.output, options.ask) as journal:
        work = _Work(options, found, journal)
        result = work.locally() if endpoint is None else work.remotely(endpoint)
    names = ("comparisons", "kept", "judged", "unread", "failed", "not_asked")
    header = ["judge", "comparisons", "judged before", "judged now", "no judgement in the reply", "failed", "not asked"]
    print_table(header, [[str(result["judge"]), *(f"{result[name]:,}" for name in names)]])
    print()
    print_json({"judge": result, "output": str(options.output)})
    return 1 if result["not_asked"] else 0


@dataclasses.dataclass(frozen=True)
class _Work:
    """The comparisons that a run is about, and the file that has some of their judgements."""

    options: Options
    comparisons: Sequence[Comparison]
    journal: Journal

    def remotely(self, endpoint: Endpoint) -> dict[str, Any]:
        """Ask the endpoint and return what is to be printed as JSON."""
        limits, asking = self.options.limits, self.options.asking
        prices = (limits.prompt_price or 0.0, limits.reply_price or 0.0)
        meter = Meter(
            Limits(limits.requests_per_minute, limits.token_limit, limits.cost_limit, prices), *self.journal.tokens()
        )
        patience = Patience(attempts=asking.attempts, concurrency=asking.concurrency)
        judging = Judging(endpoint, self.options.ask, patience, meter)
        missing = [one for one in self.comparisons if not self.journal.has(one, judging.request(one))]
        with _bar(len(missing)) as bar:
            tally = ask_all(dataclasses.replace(judging, done=lambda tally: _show(bar, tally)), missing, self.journal)
        for reason, count in sorted(tally.reasons.items(), key=lambda item: -item[1])[:_MOST_REASONS]:
            print(f"without a judgement: {count:,}: {reason}", file=sys.stderr)
        ended = tally.judged + tally.unread + tally.failed
        if tally.stopped:
            print(
                f"a limit was reached ({tally.stopped}): not asked: {len(missing) - ended:,}; a run with a "
                f"higher limit goes on",
                file=sys.stderr,
            )
        return {
            "judge": endpoint.model,
            **self._counts(len(missing)),
            "judged": tally.judged,
            "unread": tally.unread,
            "failed": tally.failed,
            "not_asked": len(missing) - ended,
            "tokens": {"prompts": meter.read, "replies": meter.written},
            "cost": meter.cost if limits.prompt_price or limits.reply_price else None,
        }

    def locally(self) -> dict[str, Any]:
        """Load the judge, write its verdicts and return what is to be printed as JSON."""
        options = self.options
        pretrained = options.model.open()
        causal_family_of(pretrained.checkpoint.config)  # raises for an encoder-decoder
        path = Path(pretrained.base.name)
        name = options.asking.judge_model or (path.name if path.exists() else pretrained.base.name)
        room = positions_left(pretrained.checkpoint.model_config, pretrained.method)
        longest = options.max_length if room is None else min(options.max_length, room)
        storage = dataclasses.asdict(options.model) | {"base": pretrained.base.name, "max_length": longest}
        requests = {
            key_of(one): request_hash([storage, judge_messages(one, "verdicts", reasons=False)]) for one in self.comparisons
        }
        missing = [one for one in self.comparisons if not self.journal.has(one, requests[key_of(one)])]
        prompts = encode_comparisons(missing, pretrained.tokenizer, longest)
        if prompts.shortened:
            print(f"comparisons whose answers are shortened to {longest:,} tokens: {prompts.shortened:,}", file=sys.stderr)
        if missing:
            model = pretrained.load(mesh=data_mesh(), progress=sys.stderr.isatty())
            mesh = data_mesh()
            with nullcontext() if mesh is None else jax.set_mesh(mesh), _bar(len(missing)) as bar:
                for indices, values in verdict_log_probabilities(*nnx.split(model), prompts, batch_size=options.batch_size):
                    for index, row in zip(indices, values.tolist(), strict=True):
                        columns = {"verdict": 1 + row.index(max(row)), "judge": name, "log_probabilities": row}
                        one = missing[index]
                        self.journal.add(one, columns | {"request": requests[key_of(one)]})
                    bar.update(len(indices))
        return {
            "judge": name,
            **self._counts(len(missing)),
            "judged": len(missing),
            "unread": 0,
            "failed": 0,
            "not_asked": 0,
        }

    def _counts(self, missing: int) -> dict[str, Any]:
        return {"kind": self.options.ask, "comparisons": len(self.comparisons), "kept": len(self.comparisons) - missing}


def _bar(total: int) -> tqdm:
    return tqdm(total=total, desc="judge", unit="comparison", disable=not sys.stderr.isatty())


def _show(bar: tqdm, tally: Tally) -> None:
    bar.set_postfix_str(f"without a judgement: {tally.unread + tally.failed:,}", refresh=False)
    bar.update()


def _check(options: Options) -> None:
    """Raise OptionError for options that contradict each other."""
    if options.local == (options.asking.endpoint is not None):
        given = "both" if options.local else "neither"
        raise OptionError(f"judge: expected either --endpoint or --local, found {given}")
    if options.local and options.ask == "scores":
        raise OptionError("--local: expected --ask verdicts, whose probabilities are compared, found scores")
    limits = options.limits
    if limits.cost_limit is not None and not (limits.prompt_price or limits.reply_price):
        raise OptionError("--cost-limit: expected prices of tokens (--prompt-price, --reply-price), found none")


def _endpoint(options: AskingOptions) -> Endpoint:
    """Return the endpoint, with the key from the environment."""
    if not options.judge_model:
        raise OptionError("--judge-model: expected the name of the judge at the endpoint, found none")
    key = None
    if options.key_variable is not None:
        key = os.environ.get(options.key_variable)
        if not key:
            raise OptionError(
                "--key-variable: expected the name of an environment variable that contains a key, found none of this name"
            )
    url = endpoint_url(options.endpoint or "", key)
    if key and url.startswith("http://") and urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1"):
        print(f"{url}: the key is sent without encryption, because the address starts with http", file=sys.stderr)
    return Endpoint(
        url,
        options.judge_model,
        key,
        timeout=options.timeout,
        max_tokens=options.max_tokens,
        length_field=options.length_field,
        temperature=options.temperature,
    )


def _saved(options: Options) -> str:
    return f"what was judged is in {options.output}; the same command goes on"
