"""What a client asks of the engine: one prompt, how its answers are drawn, and where they end.

All fields are checked when a request is made, so that a wrong one never reaches the engine. A request belongs to a tenant,
between whom the engine is fair, and names an adapter.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from qlora_jax.errors import OptionError

__all__ = ["MOST_TOP_LOGPROBS", "Choices", "Request"]

MOST_TOP_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class Choices:
    """How each next token of an answer is chosen.

    The steps are, in this order: the bias is added; the repetition penalty divides positive and multiplies negative logits
    of all tokens of the prompt and the answer (Keskar et al. 2019); the presence penalty is subtracted once and the
    frequency penalty once per occurrence, for the tokens of the answer; then temperature, top-k and top-p as in
    `serve.sampling`, and min-p excludes tokens that are less than `min_p` times as likely as the most likely one.

    Attributes:
        temperature: 0 chooses the most likely token.
        top_k, top_p: as in `Sampling`; None: no limit.
        min_p: 0: no limit.
        repetition_penalty: 1: none.
        presence_penalty, frequency_penalty: 0: none.
        logit_bias: what is added to the logits of some tokens.
        seed: draws depend on it, on the number of the answer and on the number of the token, and on no other request.

    Raises:
        OptionError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"{name}: expected a number {words}, found {value}"
            for name, value, low, high, words in (
                ("temperature", self.temperature, 0, 100, "from 0 to 100"),
                ("min_p", self.min_p, 0, 1, "from 0 to 1"),
                ("repetition_penalty", self.repetition_penalty, 0.01, 100, "from 0.01 to 100"),
                ("presence_penalty", self.presence_penalty, -2, 2, "from -2 to 2"),
                ("frequency_penalty", self.frequency_penalty, -2, 2, "from -2 to 2"),
            )
            if not (math.isfinite(value) and low <= value <= high)
        ]
        if self.top_k is not None and not 1 <= self.top_k < 2**31:
            problems.append(f"top_k: expected a whole number from 1 on, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p: expected 0 < top_p <= 1, found {self.top_p}")
        if any(not -100 <= bias <= 100 for bias in self.logit_bias.values()):
            problems.append("logit_bias: expected numbers from -100 to 100")
        if not -(2**63) <= self.seed < 2**64:
            problems.append(f"seed: expected a whole number of at most 64 bits, found {self.seed}")
        if problems:
            raise OptionError("; ".join(problems))


@dataclasses.dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: the most tokens of an answer.
        choices: how the tokens are chosen.
        count: the number of answers.
        eos_ids: tokens that end an answer and are not part of it.
        stop: texts that end an answer and are not part of it.
        top_logprobs: for how many of the most likely tokens log probabilities are returned, at most 20; None: for none, not
            even for the chosen token.
        adapter: the name of the adapter; "": the bare base.
        tenant: whose request it is.
        continues: whether the answer's text continues that of the prompt, so that its first space counts.
        grammar: what the answer must obey, for the engine's `constrain` function; None: anything.

    Raises:
        OptionError: a value outside its range.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    choices: Choices = dataclasses.field(default_factory=Choices)
    count: int = 1
    eos_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    adapter: str = ""
    tenant: str = ""
    continues: bool = False
    grammar: Any = None

    def __post_init__(self) -> None:
        problems = []
        if not self.prompt:
            problems.append("prompt: expected at least one token, found none")
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens: expected at least 1, found {self.max_new_tokens}")
        if self.count < 1:
            problems.append(f"count: expected at least 1, found {self.count}")
        if not all(self.stop):
            problems.append("stop: expected texts of at least one character, found an empty one")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS:
            problems.append(f"top_logprobs: expected 0 to {MOST_TOP_LOGPROBS}, found {self.top_logprobs}")
        if problems:
            raise OptionError("; ".join(problems))
