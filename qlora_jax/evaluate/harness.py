"""A model of qlora_jax for EleutherAI's lm-evaluation-harness (`lm_eval`), whose interface for models needs no torch.

    loglikelihood           log-probability of a continuation after a context, and whether it is the greedy one
    loglikelihood_rolling   log-probability of a whole text, in windows as long as the model's context
    generate_until          the continuation of a context up to a stop text

Tokens are made as by lm_eval's own model of transformers (`hf`): context and continuation are encoded together, a context
that is too long loses its first tokens, and a text without a context comes after the beginning of sequence (the end of
sequence where a tokenizer has none). So the results for the same weights are the same.

This module imports lm_eval, which is an extra (`eval`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jinja2
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from qlora_jax.errors import OptionError, UnsupportedError
from qlora_jax.evaluate.likelihood import TokenScores

__all__ = ["Generation", "HarnessModel"]

_UNUSED = ("do_sample", "use_cache")  # what they say is in the temperature, or changes no answer


@dataclass(frozen=True)
class Generation:
    """How lm_eval wants a group of prompts to be continued.

    Attributes:
        max_new_tokens: the most tokens of an answer.
        stop: texts that end an answer and are not part of it.
        temperature, top_p, top_k: as in `serve.Sampling`; temperature 0 is greedy.
    """

    max_new_tokens: int
    stop: tuple[str, ...]
    temperature: float
    top_p: float | None
    top_k: int | None


class HarnessModel(TemplateLM):
    """The model; see the module."""

    def __init__(
        self,
        tokenizer: Any,
        score: Callable[[Sequence[np.ndarray]], Sequence[TokenScores]],
        answer: Callable[[Sequence[Sequence[int]], Generation], Sequence[str]],
        *,
        max_length: int,
        name: str,
    ) -> None:
        """Create the model.

        Args:
            tokenizer: a fast tokenizer.
            score: returns the scores of rows of token ids (`likelihood.token_scores`).
            answer: returns the continuations of prompts of token ids.
            max_length: the most tokens that the model reads at a time.
            name: the name of the tokenizer, for lm_eval's cache of requests.

        Raises:
            OptionError: the tokenizer has no end of sequence.
        """
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise OptionError("tokenizer: expected an end-of-sequence token for lm_eval, found none")
        self.tokenizer, self._score, self._answer, self._max_length = tokenizer, score, answer, max_length
        self._name = name

    @property
    def eot_token_id(self) -> int:
        return cast(int, self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else cast(int, first)

    @property
    def max_gen_toks(self) -> int:
        return 256

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text, without a second beginning of sequence where the text has one."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return cast(list[int], self.tokenizer(string, verbose=False, **chosen)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text; without the system message where the template has none."""
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        options["continue_final_message"] = not add_generation_prompt
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except jinja2.TemplateError:
            without = [message for message in chat_history if message["role"] != "system"]
            return self.tokenizer.apply_chat_template(without, **options)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text; each token is scored once."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            found = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, found):
                windows.append((("", ""), context, continuation))
                owners.append(number)
        totals = np.zeros(len(requests))
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals.tolist()

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows: dict[tuple[int, ...], int] = {}  # the choices of a question may be the same text
        places = []
        for _, context, continuation in requests:
            row = tuple([*context, *continuation][-(self._max_length + 1) :])
            places.append((rows.setdefault(row, len(rows)), min(len(continuation), len(row) - 1)))
        scores = self._score([np.asarray(row, np.int32) for row in rows]) if rows else []
        found = []
        for (key, _, _), (index, count) in zip(requests, places, strict=True):
            one = scores[index]
            start = len(one.greedy) - count
            result = (float(one.log_probabilities[start:].sum()), bool(one.greedy[start:].all()))
            found.append(result)
            if any(key):
                self.cache_hook.add_partial("loglikelihood", key, result)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuations of all contexts; those with the same options are answered together."""
        groups: dict[Generation, list[int]] = {}
        given: list[Any] = [request.args for request in requests]  # (context, options), which their type does not say
        for number, (_, options) in enumerate(given):
            groups.setdefault(self._generation(options), []).append(number)
        answers: dict[int, str] = {}
        for generation, numbers in tqdm(groups.items(), desc="generating", disable=disable_tqdm or len(groups) < 2):
            room = self._max_length - generation.max_new_tokens
            if room < 1:
                raise OptionError(
                    f"max_gen_toks: expected less than the {self._max_length} tokens of the model, "
                    f"found {generation.max_new_tokens}"
                )
            prompts = [self.tok_encode(given[number][0])[-room:] for number in numbers]
            for number, text in zip(numbers, self._answer(prompts, generation), strict=True):
                answers[number] = text
                self.cache_hook.add_partial("generate_until", given[number], text)
        return [answers[number] for number in range(len(requests))]

    def _generation(self, options: dict[str, Any]) -> Generation:
        """Return the options of a generation.

        Raises:
            UnsupportedError: an option that has no counterpart here.
        """
        chosen: dict[str, Any] = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        end = cast(str, self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False))
        stop = tuple(text for text in handle_stop_sequences(chosen.pop("until", None), eos=end) if text)
        found = Generation(
            max_new_tokens=chosen.pop("max_gen_toks"),
            stop=stop,
            temperature=chosen.pop("temperature", 0.0),
            top_p=chosen.pop("top_p", None),
            top_k=chosen.pop("top_k", None) or None,
        )
        if unknown := [name for name in chosen if name not in _UNUSED and chosen[name] not in (None, 1, False)]:
            raise UnsupportedError(
                f"generation_kwargs: expected temperature, top_p, top_k, until and max_gen_toks, found {unknown[0]}"
            )
        return found
