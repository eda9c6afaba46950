"""The chat templates that TRL ships, tokenizers for them, and conversations that use what templates know."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# What ends a turn, of the families in turn; a tokenizer's EOS is the first that its template writes.
ENDS = ("<|im_end|>", "<|eot_id|>", "<|return|>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "<end_of_utterance>")


# One template of each habit; the other ones are slow tests.
QUICK = (
    *("cohere2", "deepseek_r1_distill", "deepseekv3_training", "diffusion_gemma_training", "gemma", "gemma3", "gemma4_v5"),
    *("glm4moe", "glm4moe_training", "gptoss", "gptoss_training", "idefics3", "lfm2_2_5", "llama3", "llama3_2"),
    *("llava_next", "muse_glimmer", "nemotron_3_nano", "phi3", "phi3_5_training", "qwen2_5", "qwen3", "qwen3_training"),
    *("qwen3_5_nothink", "qwen3_5_think_training", "smolvlm_training"),
)


def trl_templates() -> list[Any]:
    """Return one parameter for each template: its name and source; one that is skipped if TRL is not installed."""
    spec = importlib.util.find_spec("trl")  # the package itself is not imported, which takes seconds
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "chat_templates"
    if folder is None:
        return [pytest.param("trl", "", marks=pytest.mark.skip(reason="trl, to compare with, is not installed"))]
    return [
        pytest.param(
            path.stem,
            path.read_text("utf-8"),
            id=path.stem,
            marks=[] if path.stem in QUICK else pytest.mark.integration,
        )
        for path in sorted(folder.glob("*.jinja"))
    ]


def letters_for(source: str, eos: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes that has the template, and the markers in it as special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    eos = eos or next((end for end in ENDS if end in source), "<eos>")
    markers = {*re.findall(r"<[|｜][^<>\s]*?[|｜]>|<(?:start|end)_of_\w+>", source), eos, "<bos>"}
    backend.add_special_tokens([AddedToken(marker, special=True, normalized=False) for marker in sorted(markers)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token=eos,
        chat_template=source,
        clean_up_tokenization_spaces=False,
    )


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "A city."}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
RESULT = {"role": "tool", "tool_call_id": "call12345", "name": "weather", "content": 'dry, 20 "C"'}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "single": [user("Name a fruit."), answer("Pear.")],
    "multi": [user("Name a fruit."), answer("Pear."), user("A tree?"), answer("Oak."), user("A fish?"), answer("Cod.")],
    "system": [system("One word."), user("Name a fruit."), answer("Pear."), user("A tree?"), answer("Oak.")],
    "open": [user("Name a fruit."), answer("Pear."), user("A tree?")],
    "tags": [
        user("Name a fruit."),
        answer("<think>\nPears are fruit.\n</think>\n\nPear."),
        user("A tree?"),
        answer("<think>\nOaks are trees.\n</think>\n\nOak."),
    ],
    "reasoning": [
        user("Name a fruit."),
        answer("Pear.", reasoning_content="Pears are fruit."),
        user("A tree?"),
        answer("Oak.", reasoning_content="Oaks are trees."),
    ],
    "tools": [
        user("Rain in Lima?"),
        answer("", tool_calls=[CALL]),
        RESULT,
        answer("No rain."),
        user("Thanks."),
        answer("Welcome."),
    ],
    "tools and reasoning": [
        system("Be kind."),
        user("Rain in Lima?"),
        answer("", tool_calls=[CALL], reasoning_content="I look."),
        RESULT,
        answer("No rain.", reasoning_content="It is dry."),
    ],
}
