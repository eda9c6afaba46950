"""Tokenizers small enough to train in a test, one for each habit that matters to a loss mask."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import CHATML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML_TAGGED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 2 writes it: its own beginning of sequence, a space before the end of a turn.
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LINES = [
    "What is the capital of France? The capital of France is Paris.",
    "### Human: Hello there ### Assistant: Good day, how can I help you?",
    "<|im_start|>user\nassistant\nsystem\n[INST] [/INST]",
    "def add(a, b):\n    return a + b\n\nBelow is an instruction that describes a task. ### Response: ",
    "Grüße aus Köln, naïve café, 你好 мир 🙂",
]


def byte_level(special: list[str], *, trim_offsets: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 3, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def make_chatml() -> Callable[..., PreTrainedTokenizerFast]:
    """ChatML; the pad token is the end-of-sequence token, as in so many real tokenizers."""

    def make(
        chat_template: str | None = CHATML, eos: str = "<|im_end|>", trim_offsets: bool = False
    ) -> PreTrainedTokenizerFast:
        tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], trim_offsets=trim_offsets)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=eos, chat_template=chat_template)

    return make


@pytest.fixture(scope="session")
def chatml(make_chatml: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_chatml()


@pytest.fixture(scope="session")
def tagged(make_chatml: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_chatml(CHATML_TAGGED)


@pytest.fixture(scope="session")
def bare(make_chatml: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """No chat template, and no token before a text."""
    return make_chatml(None, "<|endoftext|>")


@pytest.fixture(scope="session")
def inst() -> PreTrainedTokenizerFast:
    """Puts a beginning-of-sequence token before every text by itself, and once more in its chat template."""
    tokenizer = byte_level(["<s>", "</s>"], trim_offsets=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=INST
    )


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real data sets are not there: expected the folder {folder}")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps `datasets` from leaving files in the user's cache, and from reading old ones."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
