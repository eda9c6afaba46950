"""The parameters of the base that train in addition to the adapters of linear layers.

    modules_to_save            each module whose name ends with an entry trains in full; by PEFT's rule, "norm" also
                               selects input_layernorm. A linear layer gets a change of its whole matrix as its adapter
    bias                       the biases of the adapted linear layers train ("lora_only"), or all biases ("all")
    trainable_token_indices    these rows of the input embedding train, and of the output head if it is tied; or rows of
                               embeddings given by name

If the output head is tied to the embedding, PEFT trains a copy of one of them and leaves the other unchanged, or it trains
two copies; in both cases the two are separate from then on, unless the method ensures that they stay tied. Rows that train
remain common to both. LoRA on a tied head or embedding likewise changes one of the two.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from qlora_jax.errors import OptionError
from qlora_jax.models.parameter_mapping import ParameterMapping, linear_mappings, linear_modules
from qlora_jax.nn import Delta
from qlora_jax.peft import EMBEDDING_KEYS, FullLinearSpec, Method, module_matches
from qlora_jax.quant import PackedEmbedding

EMBEDDING, HEAD = ("embed_tokens", "weight"), ("lm_head", "weight")
TIED_HEAD = ("head_delta",)  # the path of the trainable difference of an output head that is otherwise tied


@dataclasses.dataclass(frozen=True)
class TrainableBase:
    """The parameters of the base that train, by their mappings.

    Attributes:
        full: mappings of the parameters that train in full; an output head that was tied has the path `TIED_HEAD`.
        linear: mappings of the matrices of linear layers that train in full; `adapters_of` makes their changes.
        adapted: which of `EMBEDDING_KEYS` have an adapter of low rank.
        rows: (mapping, token ids) of embeddings and output heads of which some rows train.
        tied: whether a tied output head remains tied if the embedding trains.
    """

    full: tuple[ParameterMapping, ...] = ()
    linear: tuple[ParameterMapping, ...] = ()
    adapted: tuple[str, ...] = ()
    rows: tuple[tuple[ParameterMapping, tuple[int, ...]], ...] = ()
    tied: bool = False

    def rows_of(self, path: tuple[str, ...]) -> tuple[int, ...] | None:
        """Return the token ids whose rows train in the embedding or output head at this path, or None."""
        return next((tokens for mapping, tokens in self.rows if mapping.path == path), None)

    @property
    def unties(self) -> bool:
        """Whether training makes a tied output head separate from the embedding."""
        return not self.tied and (bool(self.adapted) or any(mapping.path in (EMBEDDING, TIED_HEAD) for mapping in self.full))


def trainable_base(
    method: Method | None, mappings: Sequence[ParameterMapping], *, vocabulary: int, embeddings: bool = True
) -> TrainableBase:
    """Return the parameters of the base that a method trains.

    Args:
        method: the method of fine-tuning, or None.
        mappings: the parameter mappings of the model.
        vocabulary: number of rows of the embedding.
        embeddings: whether the embedding of this family can train.

    Raises:
        OptionError: a name matches nothing or a module that cannot train, or a token id is outside the vocabulary.
    """
    if method is None:
        return TrainableBase()
    if method.is_full:
        if not embeddings:
            raise OptionError("full fine-tuning: expected a decoder-only model, found two stacks that share an embedding")
        return TrainableBase(tuple(mapping for mapping in mappings if not mapping.linear), tied=True)
    known = [*mappings]
    if embeddings and (head := tied_head(mappings)) is not None:
        known.append(ParameterMapping(head, TIED_HEAD))
    # From version 5 on, transformers and PEFT's files call the output head of GPT-NeoX lm_head; checkpoints do not.
    known += [dataclasses.replace(mapping, name="lm_head.weight") for mapping in known if mapping.name == "embed_out.weight"]
    chosen = _trained_in_full(method, known, embeddings)
    full = tuple(mapping for mapping in chosen if not mapping.linear)
    full += tuple(mapping for mapping in _trained_biases(method, mappings) if mapping not in full)
    linear = tuple(mapping for mapping in chosen if mapping.linear)
    adapted = tuple(key for key in adapters_of(method, mappings, embeddings=embeddings) if key in EMBEDDING_KEYS)
    tied = embeddings and _stays_tied(method, mappings)
    if tied and any(mapping.path in (EMBEDDING, TIED_HEAD) for mapping in full):  # one copy trains, which is both
        embedding = next(mapping for mapping in mappings if mapping.path == EMBEDDING)
        full = (embedding, *(mapping for mapping in full if mapping.path not in (EMBEDDING, TIED_HEAD)))
    rows = _trained_rows(method, known, vocabulary, embeddings)
    if both := [mapping.name for mapping, _ in rows if mapping in full]:
        raise OptionError(f"modules_to_save, trainable_token_indices: expected {both[0]} in one of them, found it in both")
    return TrainableBase(full, linear, adapted, rows, tied)


def adapters_of(method: Method | None, mappings: Sequence[ParameterMapping], *, embeddings: bool = True) -> dict[str, Any]:
    """Return what makes the adapter of each stack of linear layers, and of the token embedding and the head, by their keys.

    The keys are those of `linear_modules`, and `EMBEDDING_KEYS`. A linear layer that trains in full has no other adapter.

    Raises:
        OptionError: see `Method.targets` and `trainable_base`.
    """
    if method is None:
        return {}
    if method.is_full:
        return dict(method.targets(linear_modules(mappings)))
    vocabulary = _vocabulary_modules(mappings) if embeddings and method.adapts_embeddings else {}
    found: dict[str, Any] = dict(method.targets(linear_modules(mappings) | vocabulary))
    if "lm_head" in found and _stays_tied(method, mappings):
        head: Any = found.pop("lm_head")
        found.setdefault("embed_tokens", dataclasses.replace(head, head=False))
    for mapping in linear_mappings(mappings):
        if any(used := _matches(method, mapping)):
            found[".".join(mapping.path[:-1])] = FullLinearSpec(
                mapping.layers or 1, None if all(used) else used, packed=True
            )
    return found


def _stays_tied(method: Method, mappings: Sequence[ParameterMapping]) -> bool:
    """Return whether a tied head remains so when it is adapted; PEFT knows it, and the embedding, by Llama's names only."""
    if not method.ensure_weight_tying or tied_head(mappings) is None:
        return False
    targets = getattr(method, "target_modules", ())
    if isinstance(targets, str) and any(
        re.fullmatch(targets, name) for name in ("embed_tokens", "lm_head", "model.embed_tokens")
    ):
        return True
    names = (*method.modules_to_save, *(() if isinstance(targets, str) else targets))
    return any(name.rpartition(".")[2] in ("embed_tokens", "lm_head") for name in names)


def _vocabulary_modules(mappings: Sequence[ParameterMapping]) -> dict[str, list[str]]:
    """Return the names of the token embedding and the head, by their keys in `Method.targets`."""
    found = {mapping.path[0]: mapping.modules() for mapping in mappings if mapping.path in (EMBEDDING, HEAD)}
    return found | {"lm_head": ["lm_head"]}  # as transformers 5 calls the head of GPT-NeoX too


def tied_head(mappings: Sequence[ParameterMapping]) -> str | None:
    """Return the name that a tied output head would have in a checkpoint, or None if the head is separate."""
    names = {mapping.path: mapping.name for mapping in mappings}
    if HEAD in names or EMBEDDING not in names:
        return None
    return "embed_out.weight" if names[EMBEDDING] == "gpt_neox.embed_in.weight" else "lm_head.weight"


def add_deltas(model: Any, trainable: TrainableBase) -> None:
    """Add a trainable difference of zeros for each parameter that trains in full to a model under construction.

    Raises:
        OptionError: the parameter is a quantised embedding.
    """
    for mapping in trainable.full:
        *path, name = EMBEDDING if mapping.path == TIED_HEAD else mapping.path
        module = model
        for part in path:
            module = getattr(module, part)
        if isinstance(getattr(module, name).get_value(), PackedEmbedding):
            raise OptionError(
                f"modules_to_save: {mapping.name} trains in full: expected embedding_storage none, found a quantised "
                "embedding; rows of it can train (trainable_token_indices)"
            )
        # nnx.data tells NNX that an attribute that was None becomes a variable.
        delta = nnx.data(Delta(jnp.zeros(getattr(module, name).shape, jnp.float32)))
        if mapping.path == TIED_HEAD:
            setattr(model, TIED_HEAD[0], delta)
        else:
            setattr(module, f"{name}_delta", delta)


def _matches(method: Method, mapping: ParameterMapping) -> tuple[bool, ...]:
    """Return for each layer of a mapping whether `modules_to_save` names its module, or a module around it."""
    return tuple(any(names_module(entry, name) for entry in method.modules_to_save) for name in mapping.modules())


def names_module(entry: str, module: str) -> bool:
    """Return whether an entry of `modules_to_save` names a module with this full name, or a module around it."""
    parts = module.split(".")
    return any(".".join(parts[:end]).endswith(entry) for end in range(1, len(parts) + 1))


def _trained_in_full(method: Method, mappings: Sequence[ParameterMapping], embeddings: bool) -> tuple[ParameterMapping, ...]:
    chosen = []
    containers = {
        name.rsplit(".", depth)[0]
        for mapping in mappings
        for name in mapping.modules()
        for depth in range(1, name.count(".") + 1)
    }
    for entry in method.modules_to_save:
        matched = {mapping: [names_module(entry, name) for name in mapping.modules()] for mapping in mappings}
        found = [mapping for mapping, matches in matched.items() if any(matches)]
        parts = [name for name in sorted(containers) if name.endswith(entry)]
        if parts and not method.from_files:
            raise OptionError(f"modules_to_save {entry!r}: expected a module without parts, found {parts[0]}")
        if not found and not method.from_files:
            names = sorted({name.rsplit(".", 1)[-1] for mapping in mappings for name in mapping.modules()})
            raise OptionError(f"modules_to_save {entry!r} matches no module; their names end in: {', '.join(names)}")
        for mapping in found:
            if not embeddings and mapping.path == ("shared", "weight"):
                raise OptionError(
                    f"modules_to_save {entry!r}: expected the head, norms or linear layers, found that of both stacks"
                )
            if not mapping.linear and mapping.path[-1] != "bias" and not all(matched[mapping]):
                count = f"{sum(matched[mapping])} of the {mapping.layers}"
                raise OptionError(f"modules_to_save {entry!r}: expected all modules {mapping.name} or none, found {count}")
        chosen += found
    return tuple(mapping for mapping in mappings if mapping in chosen)


def _trained_biases(method: Method, mappings: Sequence[ParameterMapping]) -> Iterator[ParameterMapping]:
    """Yield the mappings of the biases that `Method.bias` says to train."""
    linear = [".".join(mapping.path[:-1]) for mapping in linear_mappings(mappings)]
    for mapping in mappings:
        if method.bias == "none" or mapping.path[-1] != "bias":
            continue
        if method.bias == "all":
            yield mapping
        elif ".".join(mapping.path[:-1]) in linear:
            targeted = [module_matches(method, name) for name in mapping.modules()]  # pyright: ignore[reportArgumentType]
            if any(targeted) and not all(targeted) and not method.from_files:
                raise OptionError(
                    f"bias lora_only: expected all modules {mapping.name} among the targets or none, found some"
                )
            if any(targeted):
                yield mapping


def _trained_rows(
    method: Method, mappings: Sequence[ParameterMapping], vocabulary: int, embeddings: bool
) -> tuple[tuple[ParameterMapping, tuple[int, ...]], ...]:
    if not method.trainable_tokens():
        return ()
    if not embeddings:
        raise OptionError("trainable_token_indices: expected a decoder-only model, found two stacks that share an embedding")
    found: dict[ParameterMapping, tuple[int, ...]] = {}
    for entry, tokens in method.trainable_tokens():
        mapping = next((mapping for mapping in mappings if _is_named(mapping, entry)), None)
        if mapping is None and method.from_files:
            continue
        if mapping is None:
            raise OptionError(f"trainable_token_indices {entry!r}: expected the name of the embedding or the output head")
        if beyond := [token for token in tokens if token >= vocabulary]:
            raise OptionError(f"trainable_token_indices: expected tokens below {vocabulary}, found {beyond[0]}")
        found[mapping] = tokens
    embedding = next(mapping for mapping in mappings if mapping.path == EMBEDDING)
    for mapping in [mapping for mapping in found if mapping.path == TIED_HEAD]:  # its rows are those of the embedding
        if found.pop(mapping) != found.get(embedding):
            raise OptionError(
                f"trainable_token_indices: {mapping.name} is tied to {embedding.name}: expected the same rows of both"
            )
    return tuple(found.items())


def _is_named(mapping: ParameterMapping, entry: str | None) -> bool:
    """Return whether an entry of trainable_token_indices names this embedding or head; None names the input embedding."""
    if entry is None:
        return mapping.path == EMBEDDING
    return mapping.path in (EMBEDDING, HEAD, TIED_HEAD) and mapping.modules()[0].endswith(entry)
