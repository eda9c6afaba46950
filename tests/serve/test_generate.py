"""Generation: against transformers, against a forward pass without a cache, and what it compiles."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.errors import CheckpointError
from qlora_jax.models import CausalLM, DecoderConfig
from qlora_jax.models.llama import llama_config
from qlora_jax.peft import LoRA
from qlora_jax.quant import Quantization
from qlora_jax.serve import Sampling, generate
from qlora_jax.serve.generate import decode_step

VOCABULARY = 97
CONFIG_FIELDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
CONFIG = llama_config(CONFIG_FIELDS)
# On both sides of a bucket's border, and as short as can be.
LENGTHS = (1, 5, 63, 64)


def build(config: DecoderConfig = CONFIG, **arguments: Any) -> CausalLM:
    """Compiled: op by op it takes several times as long."""

    def make() -> CausalLM:
        return CausalLM(config, rngs=nnx.Rngs(3), **arguments)

    graph, _ = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, jax.jit(lambda: nnx.state(make()))())


@functools.cache
def tiny() -> CausalLM:
    return build()


@functools.cache
def quantized_with_adapter() -> CausalLM:
    model = build(quantization=Quantization(), method=LoRA(rank=4, alpha=64))
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):  # B starts at zero: no adapter at all
        value.set_value(0.3 * jax.random.normal(jax.random.key(len(str(path))), value.shape))
    return model


def random_prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    draws = np.random.default_rng(1)
    return [draws.integers(0, VOCABULARY, length).tolist() for length in lengths]


def greedy_without_cache(model: CausalLM, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Argmax over whole forward passes of the growing text: a causal model never looks right."""
    forward = jax.jit(lambda graph, state, tokens: nnx.merge(graph, state)(tokens), static_argnums=0)
    graph, state = nnx.split(model)
    answers = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(count):
            padded = np.zeros((1, max(map(len, prompts)) + count), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(np.asarray(forward(graph, state, padded))[0, len(tokens) - 1].argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


@pytest.mark.parametrize("make", [tiny, quantized_with_adapter])
def test_greedy_equals_argmax_without_a_cache(make: Any) -> None:
    model = make()
    prompts = random_prompts()
    answers = generate(*nnx.split(model), prompts, max_new_tokens=12)
    assert answers == greedy_without_cache(model, prompts, 12)
    assert len({tuple(answer) for answer in answers}) > 1


def test_a_batch_equals_its_prompts_alone() -> None:
    graphdef, state = nnx.split(tiny())
    prompts = random_prompts()
    alone = [generate(graphdef, state, [prompt], max_new_tokens=20)[0] for prompt in prompts]
    assert generate(graphdef, state, prompts, max_new_tokens=20) == alone


SCALINGS = {
    "longrope": {
        "type": "su",
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [1.0 + 0.9 * i for i in range(8)],
        "original_max_position_embeddings": 40,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


@functools.cache
def with_scaling(kind: str, **arguments: Any) -> CausalLM:
    """A model whose frequencies depend on the length, from 41 tokens on."""
    fields = CONFIG_FIELDS | {"max_position_embeddings": 40 if kind == "dynamic" else 512, "rope_scaling": SCALINGS[kind]}
    return build(llama_config(fields), **arguments)


@functools.partial(jax.jit, static_argnums=0)
def forward(graph: Any, state: Any, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(tokens, positions=positions)


def without_cache(model: CausalLM, prompt: list[int], count: int) -> list[int]:
    """Argmax over forward passes of texts that are exactly as long as they are: longer ones have other frequencies."""
    tokens = list(prompt)
    for _ in range(count):
        padding = [0] * (64 - len(tokens))
        positions = np.asarray([[*range(len(tokens)), *padding]], np.int32)
        logits = forward(*nnx.split(model), np.asarray([tokens + padding], np.int32), positions)
        tokens.append(int(np.asarray(logits)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


OUTGROWN = (36, 5, 44)  # the first begins below the context and crosses it, the others are on one side


@pytest.mark.parametrize("kind", SCALINGS)
def test_rows_that_outgrow_the_context(kind: str) -> None:
    """As if each text had been read at once, whatever is beside it."""
    model, prompts = with_scaling(kind), random_prompts(OUTGROWN)
    answers = generate(*nnx.split(model), prompts, max_new_tokens=8)
    assert answers == [without_cache(model, prompt, 8) for prompt in prompts]


@pytest.mark.integration
@pytest.mark.parametrize("kind", SCALINGS)
def test_a_row_outgrows_the_context_alone_as_in_a_batch(kind: str) -> None:
    graphdef, state = nnx.split(with_scaling(kind))
    prompts = random_prompts((38, 30, 5, 70))
    alone = [generate(graphdef, state, [prompt], max_new_tokens=30)[0] for prompt in prompts]
    assert generate(graphdef, state, prompts, max_new_tokens=30) == alone


@pytest.mark.integration
def test_longrope_equals_transformers_beyond_the_context(torch: Any, tmp_path: Path) -> None:
    """transformers makes the cache of Phi-3 again, too."""
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}
    rope = SCALINGS["longrope"] | {"rope_type": "longrope", "rope_theta": 1e4}
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    peer = Phi3ForCausalLM(Phi3Config(**sizes, **heads, **ends, rope_parameters=rope, original_max_position_embeddings=40))
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(0, 0.15) if parameter.ndim == 2 else parameter.add_(0.1)
    peer.save_pretrained(tmp_path)
    (prompt,) = random_prompts((30,))
    expected = peer.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, 30:].tolist()
    model = load_model(open_checkpoint(str(tmp_path)), quantization=None, dtype=jnp.float32, progress=False)
    assert generate(*nnx.split(model), [prompt], max_new_tokens=30) == [expected]


@pytest.mark.integration
def test_virtual_tokens_count_to_the_length() -> None:
    """4 of them: a prompt of 32 tokens crosses the context of 40 with its 5th answered token."""
    from qlora_jax.peft import PromptTuning

    model, prompts = with_scaling("longrope", method=PromptTuning(virtual_tokens=4)), random_prompts((32, 5, 44))
    answers = generate(*nnx.split(model), prompts, max_new_tokens=8)
    assert answers == [without_cache(model, prompt, 8) for prompt in prompts]


@pytest.fixture
def torch() -> Iterator[Any]:
    """With one thread: several that wait for each other take minutes on a machine that is busy."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(threads)


@pytest.mark.integration
@pytest.mark.usefixtures("compiled_as_for_users")
def test_greedy_equals_transformers_on_a_real_model(torch: Any) -> None:
    from transformers import LlamaConfig as TorchConfig
    from transformers import LlamaForCausalLM

    try:
        path = fetch_default_model()
    except CheckpointError as error:
        pytest.skip(f"the default model is neither cached nor can it be fetched: {error}")
    checkpoint = open_checkpoint(str(path))
    tensors = {name: torch.from_numpy(checkpoint.read(name).copy()) for name in checkpoint.shapes}
    their_config = TorchConfig(**checkpoint.config)
    theirs: Any = LlamaForCausalLM.from_pretrained(None, config=their_config, state_dict=tensors)

    tokenizer: Any = load_tokenizer(path)
    questions = [
        "What is the capital of France?",
        "Name three colours.",
        "Write a haiku about the sea, in two lines.",
    ]
    chats = [[{"role": "user", "content": question}] for question in questions]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    prompts = [tokenizer(text)["input_ids"] for text in [*texts, "Once upon a time"]]
    longest = max(map(len, prompts))
    assert len({len(prompt) for prompt in prompts}) > 2

    eos = tokenizer.eos_token_id
    padded = torch.tensor([[eos] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        output = theirs.generate(
            input_ids=padded,
            attention_mask=mask,
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    expected = [row[: row.index(eos)] if eos in row else row for row in output[:, longest:].tolist()]

    model = load_model(checkpoint, quantization=None, dtype=jnp.float32, progress=False)
    answers = generate(*nnx.split(model), prompts, max_new_tokens=16, eos_ids=[eos])
    assert answers == expected
    assert tokenizer.decode(answers[0]) == "The capital of France is Paris."


class Successor(nnx.Module):
    """A decoder whose likeliest token is the last one plus 1, and which counts how often it is traced."""

    traces: list[int] = []  # noqa: RUF012 - shared on purpose: a compiled program has no other way to tell

    def __init__(self, size: int = 32) -> None:
        self.table = nnx.Param(4 * jnp.roll(jnp.eye(size), 1, axis=1))

    def init_cache(self, batch_size: int, capacity: int) -> Any:
        return jnp.zeros((batch_size, capacity), jnp.int32)

    def decode(self, tokens: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        self.traces.append(tokens.shape[1])
        last = tokens[jnp.arange(tokens.shape[0]), positions.argmax(axis=1)]
        return self.table[...][last], cache + 1


def test_each_row_ends_at_any_eos_and_the_others_go_on() -> None:
    graphdef, state = nnx.split(Successor())
    calls: list[tuple[int, int]] = []
    answers = generate(
        graphdef,
        state,
        [[3], [1, 8], [20]],
        max_new_tokens=5,
        eos_ids={6, 10},
        on_token=lambda row, token: calls.append((row, token)),
    )
    assert answers == [[4, 5], [9], [21, 22, 23, 24, 25]]
    # As they become known: step by step, rows in order, nothing of a row that has ended.
    assert calls == [(0, 4), (1, 9), (2, 21), (0, 5), (2, 22), (2, 23), (2, 24), (2, 25)]


def test_an_eos_as_the_first_or_the_last_token() -> None:
    graphdef, state = nnx.split(Successor())
    assert generate(graphdef, state, [[3], [2]], max_new_tokens=2, eos_ids=[4]) == [[], [3]]
    assert generate(graphdef, state, [[3]], max_new_tokens=1) == [[4]]


def test_a_seed_gives_the_same_answers_and_another_one_others() -> None:
    graphdef, state = nnx.split(Successor())
    sampling = Sampling(temperature=1.5, top_k=20)

    def answers(seed: int) -> list[list[int]]:
        return generate(graphdef, state, [[3], [3]], max_new_tokens=16, sampling=sampling, seed=seed)

    first = answers(0)
    assert first == answers(0)
    assert first != answers(1)
    assert first[0] != first[1]  # rows draw by themselves
    assert len(set(first[0])) > 2


def test_nothing_is_compiled_twice() -> None:
    graphdef, state = nnx.split(Successor(size=33))
    Successor.traces.clear()
    generate(graphdef, state, [[1, 2], [3]], max_new_tokens=40)
    assert Successor.traces == [64, 1]
    # Other prompts, settings, seeds, and other weights in an equal model: all the same programs.
    other_graphdef, other_state = nnx.split(Successor(size=33))
    other_state = jax.tree.map(lambda x: -x, other_state)
    sampling = Sampling(temperature=0.5)
    generate(other_graphdef, other_state, [[5] * 60, [3]], max_new_tokens=50, sampling=sampling, seed=7)
    assert Successor.traces == [64, 1]
    generate(graphdef, state, [[1] * 65, [3]], max_new_tokens=3)
    assert Successor.traces == [64, 1, 128, 1]


def test_the_cache_is_written_in_place_and_weights_are_arguments() -> None:
    model = quantized_with_adapter()
    graphdef, state = nnx.split(model)
    cache = model.init_cache(2, 256)
    token, positions = jnp.zeros(2, jnp.int32), jnp.zeros((2, 1), jnp.int32)
    memory: Any = decode_step.lower(graphdef, state, token, positions, cache).compile().memory_analysis()
    cache_bytes, state_bytes = (sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (cache, state))
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.argument_size_in_bytes >= cache_bytes + state_bytes
    _, grown = decode_step(graphdef, state, token, positions, cache)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
    assert grown.keys[:, :, :, 0].any()
    assert not grown.keys[:, :, :, 1:].any()


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([], 4, "prompts: expected at least one, found none"),
        ([[1], [], [2], []], 4, "prompt 1: expected at least one token, found none; prompt 3: "),
        ([[1]], 0, "max_new_tokens: expected at least 1, found 0"),
        ([[1], [1] * 7], 4, r"prompt 1: expected at most 10 tokens with its answer, found 7 and 4 "),
    ],
)
def test_bad_input_is_refused_before_any_computation(prompts: Any, max_new_tokens: int, message: str) -> None:
    no_model: Any = None
    with pytest.raises(ValueError, match=message):
        generate(no_model, no_model, prompts, max_new_tokens=max_new_tokens, max_positions=10)
