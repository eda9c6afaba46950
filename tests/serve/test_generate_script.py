"""The command generate: answers on stdout, one line for what is wrong, and a chat that remembers."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_jax.adapters import pretrained
from qlora_jax.adapters.files import write_adapter
from qlora_jax.adapters.metadata import AdapterMetadata
from qlora_jax.adapters.names import tensor_name
from qlora_jax.adapters.pretrained import PretrainedOptions
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.load import load
from qlora_jax.commands import generate as script
from qlora_jax.errors import CheckpointError
from qlora_jax.models.llama import llama_config
from qlora_jax.peft import LoRA
from qlora_jax.quant import Quantization

TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
HIDDEN, HEADS, LAYERS = 32, 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny random model, with a tokenizer whose tokens are bytes."""
    path = tmp_path_factory.mktemp("model")
    tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    backend.add_special_tokens([AddedToken(token, special=True) for token in tokens[:3]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(path)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(tokens),
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 300,
        "tie_word_embeddings": True,
        "eos_token_id": [1, 5],
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    draws = np.random.default_rng(0)
    shapes = {"embed_tokens": (len(tokens), HIDDEN), "gate_proj": (64, HIDDEN), "up_proj": (64, HIDDEN)}
    shapes |= {"down_proj": (HIDDEN, 64), "norm": (HIDDEN,)}
    shapes |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (HIDDEN,))
    tensors = {}
    for key in llama_config(config).parameter_mappings:
        for name in key.names():
            shape = shapes.get(name.split(".")[-2], (HIDDEN, HIDDEN))
            tensors[name] = draws.normal(0, 1 if len(shape) == 1 else 0.3, shape).astype(np.float32)
    save_file(tensors, path / "model.safetensors")
    return path


def write_small_adapter(path: Path, width: int) -> Path:
    draws = np.random.default_rng(1)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(LAYERS):
        a, b = (
            tensor_name(f"model.layers.{layer}.self_attn.q_proj", suffix) for suffix in ("lora_A.weight", "lora_B.weight")
        )
        tensors[a] = draws.normal(size=(2, width)).astype(np.float32)
        tensors[b] = draws.normal(size=(width, 2)).astype(np.float32)
    return write_adapter(tensors, path, method=LoRA(rank=2, alpha=8, target_modules=("q_proj",)))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = script.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.integration
def test_the_default_model_knows_the_capital_of_france(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        fetch_default_model()
    except CheckpointError as error:
        pytest.skip(f"the default model is neither cached nor can it be fetched: {error}")
    code, out, err = run(capsys, "--prompt", "What is the capital of France?", "--data-type", "none")
    assert (code, out) == (0, "The capital of France is Paris.\n")
    assert "tokens/s" in err


def test_several_prompts_are_one_batch_with_headings(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--model", folder, "--max-new-tokens", 8, "--data-type", "none"]
    _, hello, _ = run(capsys, *options, "--prompt", "Hello")
    _, sea, _ = run(capsys, *options, "--prompt", "The\nsea " * 9)
    code, out, _ = run(capsys, *options, "--prompt", "Hello", "The\nsea " * 9)
    heading = ("The sea " * 9)[:59] + "…"
    assert (code, out) == (0, f"[1] Hello\n{hello.strip()}\n\n[2] {heading}\n{sea.strip()}\n")
    # From a pipe, the same.
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
    assert run(capsys, *options)[:2] == (0, hello)


def test_the_trial_of_a_kernel_is_made_before_the_first_question(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(script, "try_fused", tried.append)
    loaded = script.load(script.Options(PretrainedOptions(model=str(folder))))
    assert tried == [loaded.state]


def test_the_adapter_counts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write_small_adapter(tmp_path / "adapter", HIDDEN)
    options = ["--model", folder, "--max-new-tokens", 6, "--prompt", "Hello", "--template", "plain", "--data-type", "none"]
    plain, adapted = run(capsys, *options), run(capsys, *options, "--adapter", adapter)
    assert plain[0] == adapted[0] == 0
    assert plain[1] != adapted[1]


def test_an_adapter_is_asked_as_it_was_trained(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage of the base and form of the prompt from the record beside the adapter; flags overrule it."""
    adapter = write_small_adapter(tmp_path / "adapter", HIDDEN)
    AdapterMetadata(Quantization("int4", 32, double_quantization=False), "guanaco").save(adapter)
    seen: list[Any] = []
    stored: list[str] = []

    def watched_load(checkpoint: Any, spec: Any, **settings: Any) -> Any:
        seen.append(spec.quantization)
        stored.append(spec.embedding_storage)
        return load(checkpoint, spec, **settings)

    def fake_generate(graphdef: Any, state: Any, prompts: Any, **settings: Any) -> Any:
        seen.append(PreTrainedTokenizerFast.from_pretrained(folder).decode(prompts[0]))
        return [[] for _ in prompts]

    monkeypatch.setattr(pretrained, "load", watched_load)
    monkeypatch.setattr(script, "generate", fake_generate)
    options = ["--model", folder, "--prompt", "Hi", "--adapter", adapter]
    assert run(capsys, *options)[0] == 0
    assert seen == [Quantization("int4", 32, double_quantization=False), "### Human: Hi ### Assistant:"]
    seen.clear()
    assert run(capsys, *options, "--data-type", "nf4", "--template", "chat")[0] == 0
    assert seen == [Quantization("nf4", 32, double_quantization=False), "<s>user: Hi</s><s>assistant: "]
    seen.clear()
    AdapterMetadata(None, "alpaca", "int8").save(adapter)
    assert run(capsys, *options)[0] == 0
    assert seen[0] is None
    assert stored == ["none", "none", "int8"]
    assert seen[1].startswith("Below is an instruction")
    (adapter / "qlora_jax.json").write_text('{"template": "chat"}')
    code, _, err = run(capsys, *options)
    assert (code, err.startswith(f"error: {adapter}/qlora_jax.json: expected quantization and template")) == (1, True)


def test_what_the_model_is_asked(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The template, a system message, the history of a chat, the raw prompt: as `generate` gets them."""
    asked: list[dict[str, Any]] = []
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def fake_generate(graphdef: Any, state: Any, prompts: Any, *, on_token: Any, **settings: Any) -> Any:
        asked.append({"texts": [tokenizer.decode(prompt) for prompt in prompts], **settings})
        answer = tokenizer("good 你", add_special_tokens=False)["input_ids"]
        for token in answer:
            on_token(0, token)
        return [answer for _ in prompts]

    monkeypatch.setattr(script, "generate", fake_generate)
    sampling = ["--temperature", 0.5, "--top-k", 3, "--top-p", 0.9, "--seed", 4]
    assert run(capsys, "--model", folder, "--system", "Be.", "--prompt", "Hi", *sampling)[:2] == (
        0,
        "good 你\n",
    )
    assert asked[-1]["texts"] == ["<s>system: Be.</s><s>user: Hi</s><s>assistant: "]
    assert asked[-1]["eos_ids"] == {1, 5, 7}
    assert asked[-1]["max_positions"] == 300
    assert asked[-1]["seed"] == 4
    assert asked[-1]["sampling"] == script.Sampling(0.5, 3, 0.9)

    assert run(capsys, "--model", folder, "--template", "plain", "--prompt", "Hi")[0] == 0
    assert asked[-1]["texts"] == ["Hi"]

    # A template that has no system role: the message stands in the user's turn, which is said once.
    gemma = ["--model", folder, "--chat-template", "gemma"]
    code, _, err = run(capsys, *gemma, "--system", "Be.", "--prompt", "Hi")
    assert asked[-1]["texts"] == ["<start_of_turn>user\nBe.\n\nHi<end_of_turn>\n<start_of_turn>model\n"]
    assert (code, err.count("[system message written at the start of the first user turn")) == (0, 1)

    monkeypatch.setattr("sys.stdin", Terminal("one\ntwo\n\nthree\n"))
    code, out, _ = run(capsys, "--model", folder, "--interactive")
    assert (code, out) == (0, "> good 你\n> good 你\n> ")
    assert asked[-1]["texts"] == [
        "<s>user: one</s><s>assistant: good 你</s><s>user: two</s><s>assistant: ",
    ]


def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_small_adapter(tmp_path / "other", 2 * HIDDEN)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    hello = ["--prompt", "Hello"]
    refusing = tmp_path / "refusing.jinja"
    refusing.write_text("{{ raise_exception('No.\\nNot today.') }}", "utf-8")
    for arguments, message in (
        (["--model", tmp_path / "none.gguf", *hello], "no such file or folder"),
        (["--model", folder, "--adapter", tmp_path, *hello], "is no adapter"),
        (["--model", folder, "--adapter", other, *hello], "does not fit this model"),
        (["--model", folder, "--max-new-tokens", 300, *hello], "expected at most 300 tokens"),
        (["--model", folder, "--max-new-tokens", 0, *hello], "max_new_tokens: expected at least 1, found 0"),
        (["--model", folder, "--template", "plain", "--system", "Be.", *hello], "expected one user message, found 2"),
        (["--model", folder, "--data-type", "none", "--block-size", 32, *hello], "expected a 4-bit data type, found dense"),
        (
            ["--model", folder, "--chat-template", refusing, *hello],
            "refuses this conversation: No. Not today; choose another",
        ),
        (["--model", folder, "--chat-template", "none", *hello], "chat_template: expected a file or one of chatml, gemma,"),
        (["--model", folder, "--chat-template", "gemma", "--template", "plain", *hello], "expected template chat beside it"),
        (["--model", folder], "empty prompt: number 1 of 1"),
        (["--model", folder, "--interactive"], "expected a terminal"),
        (["--model", folder, "--interactive", *hello], "--interactive takes no --prompt"),
    ):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (1, ""), arguments
        assert err.startswith("error: ")
        assert message in err
        assert "Traceback" not in err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert run(capsys, "--model", folder)[2] == "error: stdin: expected UTF-8, found byte 0xe9 at 3\n"
    assert run(capsys, "--model", folder, "--prompt", "caf\udce9")[2].startswith("error: prompt 1: expected UTF-8")
    monkeypatch.setattr("sys.stdin", Terminal())
    assert "no prompt" in run(capsys, "--model", folder)[2]


def test_help_is_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "model options",
        "prompt options",
        "answer options",
        "sampling options",
        "--top-p",
        "--adapter",
    ):
        assert part in text
