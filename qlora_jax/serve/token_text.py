"""The text and the bytes of single tokens, for log probabilities.

A token may be a part of a character. Byte-level vocabularies write each byte as a printable character; others write a space
as "▁" and single bytes as "<0x0A>".
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["token_text"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_text(tokenizer: "PreTrainedTokenizerFast") -> Callable[[int], tuple[str, bytes]]:
    """Return a function from a token to (its text, its bytes)."""
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    of_bytes = _byte_characters() if "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder) else None

    def text(token: int) -> tuple[str, bytes]:
        piece = added.get(token) or tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):  # the model has more embeddings than the tokenizer has tokens
            return "", b""
        if token in added:
            data = piece.encode()
        elif of_bytes is not None and all(character in of_bytes for character in piece):
            data = bytes(of_bytes[character] for character in piece)
        elif found := _BYTE.fullmatch(piece):
            data = bytes([int(found[1], 16)])
        else:
            data = piece.replace("▁", " ").encode()
        return data.decode(errors="replace"), data

    return text


def _byte_characters() -> dict[str, int]:
    """Return the byte of each character that GPT-2's byte-level vocabularies write.

    Printable bytes are written as themselves, the others, in order, as the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
