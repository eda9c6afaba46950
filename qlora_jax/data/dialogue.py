r"""Conversations in one text with the turns of hh-rlhf: `\n\nHuman: … \n\nAssistant: …`."""

import re

from qlora_jax.data.messages import Message

__all__ = ["is_dialogue", "split_dialogue"]

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_dialogue(text: str) -> bool:
    """Return whether a text begins with a turn."""
    return _TURN.match(text) is not None


def split_dialogue(text: str) -> tuple[Message, ...]:
    """Return the turns of a text."""
    markers = list(_TURN.finditer(text))
    ends = [marker.start() for marker in markers[1:]] + [len(text)]
    return tuple(
        {"role": _ROLES[marker.group(1)], "content": text[marker.end() : end].strip()}
        for marker, end in zip(markers, ends, strict=True)
    )
