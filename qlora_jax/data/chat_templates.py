"""Chat templates by name or from a file, for models that come without one or with one that does not suit.

    chatml     ChatML, with tools and reasoning        phi3, phi4   Microsoft's Phi
    llama2     Llama 2                                 gemma        Gemma (no system role)
    llama3     Llama 3                                 zephyr       Zephyr
    mistral    Mistral Instruct                        vicuna       Vicuna

A template of this list writes the beginning of sequence (BOS) first if the tokenizer puts it before a text by itself, so
that a model always sees it, and sees it once. A file holds a Jinja program, or JSON with such a program under
`chat_template`, as in tokenizer_config.json (of several programs, the one with the name `default`); it writes BOS itself or
not at all.
"""

import difflib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_jax.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHAT_TEMPLATES", "read_chat_template", "unknown_markers"]

_FOLDER = Path(__file__).with_name("chat_templates")
CHAT_TEMPLATES = tuple(sorted(path.stem for path in _FOLDER.glob("*.jinja")))
# Names of models, without hyphens, whose texts without tools are those of a template of the list.
_ALIASES = {"gemma2": "gemma", "gemma3": "gemma", "phi35": "phi3"}
_MARKER = re.compile(r"<\|[^<>|\s]+\|>|<(?:start|end)_of_turn>")
_QUESTION = {"role": "user", "content": "Hi"}


def read_chat_template(name: str | Path, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the source of a chat template, for `tokenizer.chat_template`.

    Args:
        name: a file, or the name of one of `CHAT_TEMPLATES`, whose case and hyphens do not matter.
        tokenizer: the tokenizer that it is for.

    Raises:
        OptionError: there is no such file or name, or it holds no chat template.
        OSError: the file cannot be read.
    """
    path = Path(os.path.expanduser(name))
    known = re.sub(r"[-_. ]", "", str(name)).lower()  # Llama-3 is llama3
    known = _ALIASES.get(known, known)
    if known in CHAT_TEMPLATES and not path.is_file():
        source = (_FOLDER / f"{known}.jinja").read_text(encoding="utf-8")
        return "{{- bos_token }}" + source if _puts_bos_before(tokenizer) else source
    if not path.is_file():
        if path.is_dir():
            raise OptionError(
                f"chat_template: {path}: expected a file, found a folder; name the file in it that holds the template, such "
                "as chat_template.jinja or tokenizer_config.json"
            )
        near = difflib.get_close_matches(known, CHAT_TEMPLATES, n=1)
        raise OptionError(
            f"chat_template: expected a file or one of {', '.join(CHAT_TEMPLATES)}, found {str(name)!r}, which is neither"
            f"{f'; did you mean {near[0]}?' if near else ''}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptionError(
            f"chat_template: {path}: expected UTF-8 text, found byte {error.object[error.start]:#04x}"
        ) from error
    source = _from_json(path, text) if text.lstrip().startswith('{"') or path.suffix.lower() == ".json" else text
    _check_source(path, source)
    return source


def unknown_markers(source: str, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the markers that a chat template writes and that are no tokens of a tokenizer, in order of appearance."""
    known = tokenizer.get_vocab()
    return [marker for marker in dict.fromkeys(_MARKER.findall(source)) if marker not in known]


def _from_json(path: Path, text: str) -> str:
    try:
        values: Any = json.loads(text)
    except ValueError as error:
        raise OptionError(f"chat_template: {path}: expected a Jinja program or JSON, found neither: {error}") from error
    source = values.get("chat_template") if isinstance(values, dict) else None
    if isinstance(source, list):
        source = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
    if isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str):
        raise OptionError(f"chat_template: {path}: expected a text under chat_template, found {type(source).__name__}")
    return source


def _check_source(path: Path, source: str) -> None:
    """Raise OptionError for a program that is empty or has an error of syntax."""
    if not source.strip():
        raise OptionError(f"chat_template: {path}: expected a Jinja program, found an empty file")
    try:
        render_jinja_template(conversations=[[_QUESTION]], chat_template=source, add_generation_prompt=True)
    except jinja2.TemplateSyntaxError as error:
        raise OptionError(
            f"chat_template: {path}, line {error.lineno}: expected a Jinja program, found a syntax error: {error.message}"
        ) from error
    except Exception:  # it may refuse this conversation, which shows when it renders the data
        return


def _puts_bos_before(tokenizer: "PreTrainedTokenizerBase") -> bool:
    tokens: Any = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and tokens[:1] == [tokenizer.bos_token_id]
