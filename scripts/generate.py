"""Ask a model, with or without an adapter.

    python scripts/generate.py --prompt "What is the capital of France?"
    python scripts/generate.py --adapter runs/adapter --interactive
    python scripts/generate.py --model meta-llama/Llama-3.2-1B --template plain --prompt "Once upon" --temperature 0.8
    cat question.txt | python scripts/generate.py

One prompt, or a chat, is answered token by token; several prompts are answered as one batch, and the answers
written one after the other. Answers go to stdout, everything else to stderr. An adapter that train.py made is
asked as it was trained: on the base in the same storage, with prompts of the same form.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, cast

import tyro
from flax import nnx
from transformers import PreTrainedTokenizerFast

from qlora_jax.adapters.pretrained import PretrainedOptions
from qlora_jax.data import Template, encode_prompt
from qlora_jax.models import T5, Model
from qlora_jax.serve import Sampling, generate, generate_seq2seq, stream_text

Message = dict[str, str]
HEADING_WIDTH = 60


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """What to ask."""

    prompt: tuple[str, ...] = ()
    """One prompt or several. None at all: stdin is the prompt."""
    system: str | None = None
    """System message, where the form of the prompt has one."""
    template: Template | None = None
    """Form of the prompt, as the adapter was trained if left out (else the chat template where the tokenizer has one);
    plain: the model continues the prompt as it is."""
    interactive: bool = False
    """Chat in the terminal, with history; an empty line or Ctrl-D ends it, Ctrl-C cuts an answer short."""


@dataclasses.dataclass(frozen=True)
class AnswerOptions:
    """How to answer."""

    max_new_tokens: int = 256
    """The most tokens of one answer."""
    seed: int = 0
    """The same seed gives the same answers."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line."""

    model: PretrainedOptions = dataclasses.field(default_factory=PretrainedOptions)
    prompt: PromptOptions = dataclasses.field(default_factory=PromptOptions)
    answer: AnswerOptions = dataclasses.field(default_factory=AnswerOptions)
    sampling: Sampling = dataclasses.field(default_factory=Sampling)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with all that asking it takes."""

    graphdef: nnx.GraphDef[Model]
    state: Any
    tokenizer: PreTrainedTokenizerFast
    template: Template
    eos_ids: frozenset[int]
    max_positions: int | None
    decoder_start_id: int | None  # None for a model without an encoder


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code."""
    try:
        options = tyro.cli(
            Annotated[Options, tyro.conf.OmitArgPrefixes],
            args=arguments,
            description=__doc__,
        )
        prompts = read_prompts(options.prompt)
        loaded = load(options)
        if options.prompt.interactive:
            chat(loaded, options)
        else:
            answer_prompts(loaded, options, prompts)
    except (ValueError, OSError) as error:  # bad input; CheckpointError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("", file=sys.stderr)
        return 130
    return 0


def read_prompts(options: PromptOptions) -> tuple[str, ...]:
    """The prompts of the command line or of stdin, none for a chat; checked before the model is loaded."""
    if options.interactive:
        if options.prompt:
            raise ValueError("--interactive takes no --prompt")
        if not sys.stdin.isatty():
            raise ValueError("--interactive: expected a terminal as stdin, found a pipe or file")
        return ()
    if not options.prompt and sys.stdin.isatty():
        raise ValueError("no prompt: give --prompt, --interactive, or text on stdin")
    prompts = options.prompt or (read_stdin(),)
    for number, prompt in enumerate(prompts, 1):
        try:
            prompt.encode("utf-8")  # bytes of an argument that are none arrive as surrogates
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt {number}: expected UTF-8, found {prompt[error.start]!a} at {error.start}") from error
    if empty := [str(number) for number, prompt in enumerate(prompts, 1) if not prompt.strip()]:
        raise ValueError(f"empty prompt: number {', '.join(empty)} of {len(prompts)}")
    return prompts


def read_stdin() -> str:
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin: expected UTF-8, found byte {data[error.start]:#04x} at {error.start}") from error


def load(options: Options) -> Loaded:
    """The model with its adapter, its tokenizer, and the tokens that end its answers."""
    pretrained = options.model.open()
    tokenizer, metadata = pretrained.tokenizer, pretrained.adapter_metadata
    template = cast(Template | None, options.prompt.template or (metadata and metadata.template))
    if template in (None, "auto"):
        template = "plain" if tokenizer.chat_template is None else "chat"
    encode_prompt([*opening(options), user("?")], tokenizer, template=template)  # can this form hold such a conversation?
    model = pretrained.load(progress=sys.stderr.isatty())
    graphdef, state = nnx.split(model)
    eos_ids = pretrained.stop_ids
    if isinstance(model, T5):  # nothing limits its length
        return Loaded(graphdef, state, tokenizer, template, eos_ids, None, model.config.decoder_start_token_id)
    return Loaded(graphdef, state, tokenizer, template, eos_ids, model.max_positions, None)


def answer_prompts(loaded: Loaded, options: Options, prompts: Sequence[str]) -> None:
    """Answers a batch: one prompt as a stream, several one after the other, with headings."""
    conversations = [[*opening(options), user(prompt)] for prompt in prompts]
    tokens = [prompt_tokens(loaded, conversation) for conversation in conversations]
    # An answer that goes on a text may begin with its space.
    context = tokens[0] if loaded.template == "plain" and loaded.decoder_start_id is None else []
    if len(prompts) == 1:
        answer(loaded, options, tokens, write, context)
        write("\n")
        return
    answers = answer(loaded, options, tokens, lambda _: None)
    for number, (prompt, ids) in enumerate(zip(prompts, answers, strict=True), 1):
        shortened = " ".join(prompt.split())
        if len(shortened) > HEADING_WIDTH:
            shortened = shortened[: HEADING_WIDTH - 1] + "…"
        text = cast(str, loaded.tokenizer.decode(ids, skip_special_tokens=True))
        write(f"{'' if number == 1 else chr(10)}[{number}] {shortened}\n{text.strip()}\n")


def chat(loaded: Loaded, options: Options) -> None:
    """Asks and answers in turn until an empty line or the end of stdin."""
    messages = opening(options)
    if loaded.template in ("alpaca", "plain"):
        print(f"[the form {loaded.template} has no history: each question stands alone]", file=sys.stderr)
    while True:
        try:
            question = input("> ")
        except EOFError:
            print()
            return
        if not question.strip():
            return
        if loaded.template in ("alpaca", "plain"):
            messages = opening(options)
        messages.append(user(question))
        said: list[str] = []

        def write_and_keep(piece: str, said: list[str] = said) -> None:
            said.append(piece)
            write(piece)

        try:
            answer(loaded, options, [prompt_tokens(loaded, messages)], write_and_keep)
        except KeyboardInterrupt:  # what was said so far stays in the history
            write(" …")
        except ValueError as error:  # too long
            print(f"error: {error}; the conversation begins anew", file=sys.stderr)
            messages = opening(options)
            continue
        write("\n")
        messages.append({"role": "assistant", "content": "".join(said).strip()})


def answer(
    loaded: Loaded,
    options: Options,
    tokens: list[list[int]],
    write: Callable[[str], None],
    context: Sequence[int] = (),
) -> list[list[int]]:
    """The answers to a batch; the first one goes to `write` as it comes, and figures to stderr."""
    start, arrivals = time.perf_counter(), []
    with stream_text(loaded.tokenizer, write, context=context) as stream:

        def on_token(row: int, token: int) -> None:
            arrivals.append(time.perf_counter())
            stream(row, token)

        run = (
            partial(generate, max_positions=loaded.max_positions)
            if loaded.decoder_start_id is None
            else partial(generate_seq2seq, decoder_start_id=loaded.decoder_start_id)
        )
        answers = run(
            loaded.graphdef,
            loaded.state,
            tokens,
            max_new_tokens=options.answer.max_new_tokens,
            eos_ids=loaded.eos_ids,
            sampling=options.sampling,
            seed=options.answer.seed,
            on_token=on_token,
        )
    sys.stdout.flush()
    # The first token of each row comes out of the prefill, and waits for the compiler.
    first = sum(bool(row) for row in answers)
    if len(arrivals) > first:
        rate = (len(arrivals) - first) / (arrivals[-1] - arrivals[first - 1])
        print(
            f"\n[{len(arrivals)} tokens, the first after {arrivals[0] - start:.1f} s (compiling included), "
            f"then {rate:.1f} tokens/s]",
            file=sys.stderr,
        )
    return answers


def prompt_tokens(loaded: Loaded, messages: list[Message]) -> list[int]:
    """The tokens of a conversation, up to where the answer begins; the source of an encoder-decoder, which ends there."""
    tokens = encode_prompt(messages, loaded.tokenizer, template=loaded.template).tolist()
    return tokens if loaded.decoder_start_id is None else [*tokens, cast(int, loaded.tokenizer.eos_token_id)]


def opening(options: Options) -> list[Message]:
    """The messages before the first question."""
    return [] if options.prompt.system is None else [{"role": "system", "content": options.prompt.system}]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def write(text: str) -> None:
    """To stdout, at once."""
    print(text, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
