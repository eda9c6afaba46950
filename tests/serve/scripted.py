"""A model that answers with given texts, and a service of it whose chat template (chatml) has tools.

The likeliest token depends on the position alone: from position `PLACE * (index + 1)` on, the model writes text `index`. A
prompt that is as long asks for that text (`Scripts.messages`).
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from test_engine import make

from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.data import encode_prompt, read_chat_template
from qlora_jax.serve.grammars import constrain_by
from qlora_jax.serve.http import Service
from qlora_jax.serve.http_calls import Prepared, chat_call
from qlora_jax.serve.scheduler import Limits
from qlora_jax.serve.token_text import token_text
from qlora_jax.serve.tool_format import special_markers, tool_format
from qlora_jax.serve.worker import Worker

PLACE = 1024


class Scripted(nnx.Module):
    """A decoder whose likeliest next token is in a table, by the position of the last one."""

    def __init__(self, script: Any, size: int) -> None:
        self.script, self.table = nnx.Param(script), nnx.Param(4 * jnp.eye(size))

    def init_cache(self, batch_size: int, capacity: int) -> Any:
        return jnp.zeros((1, batch_size, capacity), jnp.int32)

    def decode(self, tokens: jax.Array, positions: jax.Array, cache: Any, **_: Any) -> tuple[jax.Array, Any]:
        return self.table[...][self.script[...][positions.max(axis=1)]], cache + 1


@dataclasses.dataclass(frozen=True)
class Scripts:
    """A service, and the messages that ask it for its texts."""

    service: Service

    def messages(self, index: int, tools: Any = (), before: Any = ()) -> list[Any]:
        """Return messages after which the model writes text `index`."""

        def made(length: int) -> list[Any]:
            return [*before, {"role": "user", "content": "x" * length}]

        call = chat_call({"model": "", "messages": made(0), "tools": list(tools)})
        given = [tool.given for tool in call.tools.tools] if call.tools else []
        length = PLACE * (index + 1) - len(self.service.prepared.chat(call.prompts[0], given))
        assert length > 0
        return made(length)


def scripted(folder: Path, *texts: str, special: tuple[str, ...] = ()) -> Scripts:
    """Return a service whose model writes these texts."""
    tokenizer: Any = load_tokenizer(folder)
    tokenizer.chat_template = read_chat_template("chatml", tokenizer)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    size, end = len(tokenizer), 1
    script = [end] * (PLACE * (len(texts) + 2))
    for index, text in enumerate(texts):
        ids = tokenizer.encode(text, add_special_tokens=False)
        script[PLACE * (index + 1) - 1 : PLACE * (index + 1) - 1 + len(ids)] = ids
    limits = Limits(rows=2, capacity=len(script), chunk=256, waiting=8, waiting_per_tenant=8)
    constrain = constrain_by(tokenizer, size, [end])
    engine = make(Scripted(jnp.array(script), size), limits, size, tokenizer=tokenizer, constrain=constrain)
    engine.warm_up()
    prepared = Prepared(
        chat=lambda messages, tools: encode_prompt(list(messages), tokenizer, template="chat", tools=tools).tolist(),
        text=lambda text: encode_prompt(text, tokenizer, template="plain").tolist(),
        eos_ids=frozenset([end]),
        capacity=limits.capacity,
        calls=tool_format(tokenizer),
        markers=special_markers(tokenizer),
    )
    return Scripts(Service(Worker(engine), "scripted", list, prepared, token_text(tokenizer), most_bytes=2**16))
