"""The answers of conversations by all chat templates of TRL, against transformers' prompts of inference and TRL's tags.

The 26 templates of the fast tests take about 4 seconds, most of it for compiling them.
"""

import json
import random
import re
from typing import Any

import numpy as np
import pytest
from peer_templates import CALL, CONVERSATIONS, RESULT, TOOL, answer, letters_for, system, trl_templates, user
from transformers import PreTrainedTokenizerFast

from qlora_jax.data import DataError, Example, Report, encode_all

# Templates whose finished texts lack the end of their own generation prompt (an opened `<think>`, an empty
# `<think></think>`) before some answers.
BY_CONTENT = ("deepseek", "nemotron", "qwen3_5_nothink")
# Templates that read a key of answers only in some cases, or drop what they read.
DROP_CALLS = ("deepseek_r1",)
DROP_REASONING = ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "deepseekv3", "deepseekv3_training")
# Templates without an end-of-turn token: the marker of the next turn ends an answer.
NO_END = {"glm4moe": ("<|user|>", "<|observation|>")}
# How templates that take content as a list of parts only read the first part.
PARTS = ("['content'][0]['type']", "['content'] | selectattr", "['content']|selectattr", "message.content[0].type")
Run = tuple[str, str]


def encoded(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], **options: Any
) -> tuple[list[Example], Report]:
    row = {"messages": messages, "tools": options.pop("tools", None)}
    return encode_all([row], tokenizer, max_length=100_000, template="chat", progress=False, **options)


def runs(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[Run]:
    """Return the text before each run of learned tokens, and the text of the run without an EOS that is not a template's."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], example.loss_mask, [False]]))).reshape(-1, 2)
    return [
        (tokenizer.decode(example.tokens[:start].tolist()), tokenizer.decode(example.tokens[start:end].tolist()))
        for start, end in edges
    ]


def with_arguments_as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    text = json.dumps(CALL["function"]["arguments"])
    call = CALL | {"function": CALL["function"] | {"arguments": text}}
    return [message | {"tool_calls": [call]} if "tool_calls" in message else message for message in messages]


class Peer:
    """What transformers renders, with the messages in the form that the template takes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], tools: list[Any] | None):
        self._tokenizer, self._tools = tokenizer, tools
        source = str(tokenizer.chat_template)
        if "System role not supported" in source and messages[0]["role"] == "system":
            messages = [user(f"{messages[0]['content']}\n\n{messages[1]['content']}"), *messages[2:]]
        if "+ tool['function']['arguments'] +" in source:
            messages = with_arguments_as_text(messages)
        if any(access in source for access in PARTS):
            messages = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
        self.messages = messages
        self.turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]

    def text(self, count: int, *, prompt: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                self.messages[:count], tools=self._tools, tokenize=False, add_generation_prompt=prompt
            )
        )

    def masked(self, count: int) -> tuple[list[int], np.ndarray]:
        out: Any = self._tokenizer.apply_chat_template(
            self.messages[:count], tools=self._tools, return_dict=True, return_assistant_tokens_mask=True
        )
        return out["input_ids"], np.array(out["assistant_masks"], bool)


def check_against_inference(
    examples: list[Example],
    peer: Peer,
    tokenizer: PreTrainedTokenizerFast,
    *,
    by_content: bool,
    markers: tuple[str, ...] = (),
) -> None:
    """Each answer is learned once, after the prompt of inference, and is the rest of the finished text.

    Without an end-of-turn token in it, one of the `markers` follows, which is learned as well.
    """
    found = [run for example in examples for run in runs(example, tokenizer)]
    tagged = "endgeneration" in str(tokenizer.chat_template)
    assert len(found) == len(peer.turns)
    for turn in peer.turns:
        prompt, finished = peer.text(turn, prompt=True), peer.text(turn + 1)
        exact = [learned for before, learned in found if before == prompt]
        if not exact and tagged:  # the tags leave out a header that the template writes after the prompt
            exact = [learned for before, learned in found if before.startswith(prompt) and finished.startswith(before)]
        if not exact:
            assert by_content
            assert any(prompt.startswith(before) and learned in finished for before, learned in found)
            continue
        if markers:
            assert exact[0].endswith((*markers, tokenizer.eos_token))
        (learned,) = (
            re.sub(rf"({'|'.join(map(re.escape, (*markers, tokenizer.eos_token)))})\Z", "", text) for text in exact
        )
        if finished.startswith(prompt):
            answered = finished[len(prompt) :].rstrip().removesuffix(tokenizer.eos_token)
            # A learned line end is that of the tags.
            assert learned == answered or (tagged and learned.strip().removesuffix(tokenizer.eos_token) in answered)


def check_ids(examples: list[Example], peer: Peer, tokenizer: PreTrainedTokenizerFast) -> None:
    """The ids are those of `apply_chat_template`, up to the last answer; then EOS follows, which the template may lack."""
    finished = [peer.masked(count)[0] for count in [*(turn + 1 for turn in peer.turns), len(peer.messages)]]
    for example in examples:
        tokens = example.tokens.tolist()
        closed = tokens[:-1] if tokens[-1] == tokenizer.eos_token_id else tokens
        assert any(ids[: len(closed)] == closed for ids in finished)


def check_against_tags(examples: list[Example], peer: Peer, tokenizer: PreTrainedTokenizerFast) -> None:
    """What is learned of a finished text is what TRL's tags enclose, apart from white space after answers and headers."""
    for example in examples:
        for turn in peer.turns:
            ids, tags = peer.masked(turn + 1)
            tokens = example.tokens[: len(ids)]
            shared = int(np.argmin(np.append(tokens == ids[: len(tokens)], False)))
            if not tags.any() or shared < min(len(tokens), len(ids)) - 1 or not -2 <= len(example) - len(ids) <= 1:
                continue
            mask = example.loss_mask[:shared]
            assert not (mask & ~tags[: len(mask)]).any()
            for _, end in np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]))).reshape(-1, 2):
                rest = ids[end:][: int(np.argmin(np.append(tags[end:], False)))]
                assert not tokenizer.decode(rest).strip().removeprefix(tokenizer.eos_token)


@pytest.mark.parametrize(("name", "source"), trl_templates())
def test_answers_are_what_follows_the_prompts_of_inference(name: str, source: str) -> None:
    tokenizer = letters_for(source)
    code = re.sub(r"\{#.*?#\}", "", source, flags=re.DOTALL)
    calls = "tool_calls" in code and not name.startswith(DROP_CALLS)
    reasoning = "reasoning_content" in code or "thinking" in code or name.startswith("deepseek")
    for what, messages in CONVERSATIONS.items():
        tools = [TOOL] if "tools" in what else None
        drops = what == "tools and reasoning" or (what == "reasoning" and name.startswith("gemma"))
        if (tools and not calls) or ("reasoning" in what and (not reasoning or (drops and name in DROP_REASONING))):
            with pytest.raises(DataError, match=r"the chat template (drops|refuses) "):
                encoded(tokenizer, messages, tools=tools)
            continue
        examples, report = encoded(tokenizer, messages, tools=tools)
        peer = Peer(tokenizer, messages, tools)
        by_content, markers = name.startswith(BY_CONTENT), NO_END.get(name, ())
        check_against_inference(examples, peer, tokenizer, by_content=by_content, markers=markers)
        if not name.startswith("deepseek") and not (name.startswith("gptoss") and what == "tools and reasoning"):
            check_ids(examples, peer, tokenizer)
        check_against_tags(examples, peer, tokenizer)
        assert (report.kept, report.examples) == (1, len(examples))


@pytest.mark.parametrize(("name", "source"), trl_templates())
def test_masked_answers_are_not_learned_with_the_prompts(name: str, source: str) -> None:
    """Templates rewrite them, drop their reasoning, or leave out the end of their prompts."""
    tokenizer, masked = letters_for(source), {"weight": 0}
    thought = answer("<think>\nOaks are trees.\n</think>\n\nOak.", **masked)
    fruit, tree, fish, oak = user("Name a fruit."), user("A tree?"), user("A fish?"), answer("Oak.", **masked)
    for messages, questions in (
        ([fruit, answer("Pear."), tree, oak, fish, answer("Cod.")], ("Name a fruit.", "A fish?")),
        ([fruit, answer("Pear."), tree, thought, fish, answer("Cod.")], ("Name a fruit.", "A fish?")),
        ([tree, oak, fruit, answer("Pear.")], ("Name a fruit.", "A tree?")),
        ([tree, oak], ("A tree?",)),
    ):
        examples, _ = encoded(tokenizer, messages, train_on_source=True)
        learned = " ".join(text for example in examples for _, text in runs(example, tokenizer))
        assert "Oak" not in learned
        assert [learned.count(question) for question in questions] == [1] * len(questions)
    if "tool_calls" in source:
        called = [fruit, answer("Pear."), user("Rain?"), answer("", tool_calls=[CALL], **masked), RESULT, answer("No rain.")]
        try:
            examples, _ = encoded(tokenizer, called, tools=[TOOL], train_on_source=True)
        except DataError:  # a template without tools
            return
        learned = " ".join(text for example in examples for _, text in runs(example, tokenizer))
        assert "Lima" not in learned
        assert "No rain." in learned


@pytest.mark.parametrize("what", CONVERSATIONS)
def test_the_marker_of_the_next_turn_ends_an_answer_as_in_trl(what: str) -> None:
    """GLM-4 has no end-of-turn token: inference stops at the marker. TRL's template for training teaches it, too."""
    templates = {case.values[0]: case.values[1] for case in trl_templates()}
    if "glm4moe" not in templates:
        pytest.skip("trl, to compare with, is not installed")
    names, tools = ("glm4moe", "glm4moe_training"), [TOOL] if "tools" in what else None
    found = [encoded(letters_for(templates[name]), CONVERSATIONS[what], tools=tools)[0] for name in names]
    for ours, theirs in zip(*found, strict=True):
        length = len(ours) - 1  # after the last answer, ours have EOS, and theirs the marker
        np.testing.assert_array_equal(ours.tokens[:length], theirs.tokens[:length])
        np.testing.assert_array_equal(ours.loss_mask[:length], theirs.loss_mask[:length])


WORDS = (
    "Pear.",
    "n",
    "think",
    "assistant",
    "  spaced  ",
    "<b>bold</b>",
    '{"a": 1}',
    "ü 🙂",
    "- a\n- b\n",
    "\n",
    "",
    "Oak\n\nTree",
)


def random_conversation(draw: random.Random) -> list[dict[str, Any]]:
    """Return turns of odd texts, twice the same among them, with calls, reasoning and answers that are not learned."""
    messages = [system(draw.choice(WORDS))] if draw.random() < 0.3 else []
    for number in range(draw.randint(1, 4)):
        messages.append(user(f"question {number}" if draw.random() < 0.4 else draw.choice(WORDS)))
        if draw.random() < 0.1:
            messages += [answer(draw.choice(WORDS), tool_calls=[CALL]), RESULT | {"content": draw.choice(WORDS)}]
        more: dict[str, Any] = {"weight": 0} if draw.random() < 0.1 else {}
        thought = f"thought {number}" if draw.random() < 0.3 else ""
        text = draw.choice(WORDS)
        if thought and draw.random() < 0.5:
            messages.append(answer(text, reasoning_content=thought, **more))
        else:
            messages.append(answer(f"<think>\n{thought}\n</think>\n\n{text}" if thought else text, **more))
    return messages


@pytest.mark.integration
@pytest.mark.parametrize(("name", "source"), trl_templates())
def test_random_conversations_are_learned_rightly_or_refused(name: str, source: str) -> None:
    tokenizer, draw, done = letters_for(source), random.Random(7), 0
    for _ in range(30):
        messages = random_conversation(draw)
        tools = [TOOL] if any("tool_calls" in message for message in messages) else None
        try:
            examples, _ = encoded(tokenizer, messages, tools=tools)
        except DataError:
            continue
        found = [run for example in examples for run in runs(example, tokenizer)]
        assert not any("question" in learned for _, learned in found)
        if "endgeneration" not in source:
            learned = [message for message in messages if message["role"] == "assistant" and message.get("weight", 1)]
            assert len(found) <= len(learned)  # an answer of white space may be no text at all
            for message in learned:
                parts = [*re.split("</?think>", message["content"]), message.get("reasoning_content", "")]
                assert any(all("".join(part.split()) in "".join(text.split()) for part in parts) for _, text in found)
        done += 1
    assert done
