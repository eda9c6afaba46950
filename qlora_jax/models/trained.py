"""What an adapter trains besides the adapters: whole token tables, heads and norms, or rows of the tables.

    modules_to_save            every module whose name ends with one of these, by PEFT's rule: "norm" is input_layernorm too
    trainable_token_indices    rows of the token table, and of the head where that is the same table; or rows by table

Where the head is the token table, PEFT trains a copy of the one and leaves the other as it was, or two copies: from then on
they are two. Rows stay common to both.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from qlora_jax.models.parameter_mapping import ParameterMapping
from qlora_jax.nn import Delta
from qlora_jax.peft import Method
from qlora_jax.quant import PackedEmbedding

TABLE, HEAD = ("embed_tokens", "weight"), ("lm_head", "weight")
TIED_HEAD = ("head_delta",)  # the path of the change of a head that is the token table otherwise


@dataclasses.dataclass(frozen=True)
class Trained:
    """Rows of the table of keys, and which part of their parameters trains.

    Attributes:
        whole: those that train as a whole; that of a head which is otherwise the token table has the path `TIED_HEAD`.
        rows: (row of the table of keys, tokens) for tables of which some rows train.
        tied: whether a head that is the token table stays so where the table trains.
    """

    whole: tuple[ParameterMapping, ...] = ()
    rows: tuple[tuple[ParameterMapping, tuple[int, ...]], ...] = ()
    tied: bool = False

    def rows_of(self, path: tuple[str, ...]) -> tuple[int, ...] | None:
        """The tokens whose rows train in the table at that path."""
        return next((tokens for key, tokens in self.rows if key.path == path), None)

    @property
    def unties(self) -> bool:
        """Whether a head that is the token table would become one of its own."""
        return not self.tied and any(key.path in (TABLE, TIED_HEAD) for key in self.whole)


def trained_parts(
    method: Method | None, keys: Sequence[ParameterMapping], *, vocabulary: int, tables: bool = True
) -> Trained:
    """What of a model with these keys trains besides the adapters.

    Args:
        vocabulary: rows of the token table.
        tables: whether the family's token table can train.

    Raises:
        ValueError: a name that matches nothing or what cannot train, or tokens that the table lacks.
    """
    if method is None:
        return Trained()
    if method.is_full:
        if not tables:
            raise ValueError("full fine-tuning: expected a decoder-only model, found two stacks that share a table")
        return Trained(tuple(key for key in keys if not key.linear), tied=True)
    known = [*keys]
    if tables and (head := tied_head(keys)) is not None:
        known.append(ParameterMapping(head, TIED_HEAD))
    # transformers calls the head of GPT-NeoX lm_head from version 5 on, and so do PEFT's files; checkpoints do not.
    known += [dataclasses.replace(key, name="lm_head.weight") for key in known if key.name == "embed_out.weight"]
    whole = _whole(method, known, tables)
    rows = _rows(method, known, vocabulary, tables)
    if both := [key.name for key, _ in rows if key in whole]:
        raise ValueError(f"modules_to_save, trainable_token_indices: expected {both[0]} in one of them, found it in both")
    return Trained(whole, rows)


def tied_head(keys: Sequence[ParameterMapping]) -> str | None:
    """The name that the head's tensor would have where the token table is the head; None where there is a head."""
    names = {key.path: key.name for key in keys}
    if HEAD in names or TABLE not in names:
        return None
    return "embed_out.weight" if names[TABLE] == "gpt_neox.embed_in.weight" else "lm_head.weight"


def attach(model: Any, trained: Trained) -> None:
    """Gives the modules of a model under construction a change of zero for each parameter that trains as a whole.

    Raises:
        ValueError: it is a table in fewer bits.
    """
    for key in trained.whole:
        *path, name = TABLE if key.path == TIED_HEAD else key.path
        module = model
        for part in path:
            module = getattr(module, part)
        if isinstance(getattr(module, name).get_value(), PackedEmbedding):
            raise ValueError(
                f"modules_to_save: {key.name} trains as a whole: expected embedding_storage none, found packed tables; "
                "rows of them can train (trainable_token_indices)"
            )
        # Where None stood, NNX has to be told that a variable comes.
        delta = nnx.data(Delta(jnp.zeros(getattr(module, name).shape, jnp.float32)))
        if key.path == TIED_HEAD:
            setattr(model, TIED_HEAD[0], delta)
        else:
            setattr(module, f"{name}_delta", delta)


def _whole(method: Method, keys: Sequence[ParameterMapping], tables: bool) -> tuple[ParameterMapping, ...]:
    chosen = []
    containers = {
        name.rsplit(".", depth)[0] for key in keys for name in key.modules() for depth in range(1, name.count(".") + 1)
    }
    for entry in method.modules_to_save:
        matched = {key: [name.endswith(entry) for name in key.modules()] for key in keys}
        found = [key for key, matches in matched.items() if any(matches)]
        if parts := [name for name in sorted(containers) if name.endswith(entry)]:
            raise ValueError(f"modules_to_save {entry!r}: expected a module without parts, found {parts[0]}")
        if not found:
            names = sorted({name.rsplit(".", 1)[-1] for key in keys if not key.linear for name in key.modules()})
            raise ValueError(f"modules_to_save {entry!r} matches no module; their names end in: {', '.join(names)}")
        for key in found:
            if key.linear or (not tables and key.path == ("shared", "weight")):
                what = "a linear layer, which an adapter trains" if key.linear else "the table that both stacks share"
                raise ValueError(f"modules_to_save {entry!r}: expected token tables, heads or norms, found {what}")
            if not all(matched[key]):
                count = f"{sum(matched[key])} of the {key.layers}"
                raise ValueError(f"modules_to_save {entry!r}: expected all modules {key.name} or none, found {count}")
        chosen += found
    return tuple(key for key in keys if key in chosen)


def _rows(
    method: Method, keys: Sequence[ParameterMapping], vocabulary: int, tables: bool
) -> tuple[tuple[ParameterMapping, tuple[int, ...]], ...]:
    if not method.token_rows():
        return ()
    if not tables:
        raise ValueError("trainable_token_indices: expected a decoder-only model, found two stacks that share a table")
    found: dict[ParameterMapping, tuple[int, ...]] = {}
    for entry, tokens in method.token_rows():
        key = next((k for k in keys if _is_table(k, entry)), None)
        if key is None:
            raise ValueError(f"trainable_token_indices {entry!r}: expected the name of the token table or the head")
        if beyond := [token for token in tokens if token >= vocabulary]:
            raise ValueError(f"trainable_token_indices: expected tokens below {vocabulary}, found {beyond[0]}")
        found[key] = tokens
    table = next(key for key in keys if key.path == TABLE)
    for key in [key for key in found if key.path == TIED_HEAD]:  # the rows are those of the token table
        if found.pop(key) != found.get(table):
            raise ValueError(f"trainable_token_indices: {key.name} is {table.name}: expected the same rows of both")
    return tuple(found.items())


def _is_table(key: ParameterMapping, entry: str | None) -> bool:
    if entry is None:
        return key.path == TABLE
    return key.path in (TABLE, HEAD, TIED_HEAD) and key.modules()[0].endswith(entry)
