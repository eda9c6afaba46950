"""Ask a model, with or without an adapter.

    python scripts/generate.py --prompt "What is the capital of France?"
    python scripts/generate.py --adapter runs/adapter --interactive
    python scripts/generate.py --model meta-llama/Llama-3.2-1B --template plain --prompt "Once upon" --temperature 0.8
    cat question.txt | python scripts/generate.py

The answer to a single prompt, or in a chat, is printed token by token; several prompts are answered as one batch, and the
answers are printed one after the other. Answers are printed on stdout, everything else on stderr. With an adapter that
train.py wrote, the base model has the storage and the prompts have the template that they had in training.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from qlora_jax import cli
from qlora_jax.adapters.pretrained import Pretrained, PretrainedOptions
from qlora_jax.data import NAME_EOS, DataError, Template, chat_prompt, check_ids, encode_prompt, read_chat_template
from qlora_jax.errors import OptionError
from qlora_jax.interrupts import plain_interrupt
from qlora_jax.models import T5, Model
from qlora_jax.nn import MeshShape, context_mesh, data_mesh, mesh_context
from qlora_jax.quant.kernels import try_fused
from qlora_jax.serve import Sampling, generate, generate_seq2seq, stream_text

Message = dict[str, str]
HEADING_WIDTH = 60


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """Options of the prompts."""

    prompt: tuple[str, ...] = ()
    """One or more prompts; if left out, the prompt is read from stdin."""
    system: str | None = None
    """System message, for templates that have one."""
    template: Template | None = None
    """Template of the prompt; if left out, that of the adapter's training, else the chat template if the tokenizer has one.
    With plain, the model continues the prompt as it is."""
    chat_template: str | None = None
    """Chat template: a Jinja file or a name (chatml, llama3, gemma …), in place of that of the adapter or the model."""
    interactive: bool = False
    """Chat in the terminal, with history. An empty line or Ctrl-D ends the chat, Ctrl-C ends one answer."""


@dataclasses.dataclass(frozen=True)
class AnswerOptions:
    """Options of the answers."""

    max_new_tokens: int = 256
    """Maximum number of tokens of an answer."""
    seed: int = 0
    """Seed of the sampling; the same seed gives the same answers."""
    mesh: str | None = None
    """Devices along each axis over which the model is spread, such as tensor=4; one device if not given."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command."""

    model: PretrainedOptions = dataclasses.field(default_factory=PretrainedOptions)
    prompt: PromptOptions = dataclasses.field(default_factory=PromptOptions)
    answer: AnswerOptions = dataclasses.field(default_factory=AnswerOptions)
    sampling: Sampling = dataclasses.field(default_factory=Sampling)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with everything that is needed to generate answers."""

    graphdef: nnx.GraphDef[Model]
    state: Any
    tokenizer: PreTrainedTokenizerFast
    template: Template
    eos_ids: frozenset[int]
    vocabulary: int  # tokens for which the model has an embedding
    max_positions: int | None
    decoder_start_id: int | None  # None for a model without an encoder


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.run(generate_answers, Options, __doc__, arguments, program=program)


def generate_answers(options: Options) -> None:
    """Answer the prompts of the command line or of stdin, or chat in the terminal."""
    prompts = read_prompts(options.prompt)
    with mesh_context(mesh_of(options.answer)):
        loaded = load(options, prompts)
        if options.prompt.interactive:
            chat(loaded, options)
        else:
            answer_prompts(loaded, options, prompts)


def mesh_of(options: AnswerOptions) -> Mesh | None:
    """Return the mesh over which the model is spread; None: it is on one device."""
    return None if options.mesh is None else data_mesh(MeshShape.parse(options.mesh))


def read_prompts(options: PromptOptions) -> tuple[str, ...]:
    """Return the prompts of the command line or of stdin, none for a chat. They are checked before the model is loaded."""
    if options.interactive:
        if options.prompt:
            raise OptionError("--interactive takes no --prompt")
        if not sys.stdin.isatty():
            raise OptionError("--interactive: expected a terminal as stdin, found a pipe or file")
        return ()
    if not options.prompt and sys.stdin.isatty():
        raise OptionError("no prompt: give --prompt, --interactive, or text on stdin")
    prompts = options.prompt or (read_stdin(),)
    for number, prompt in enumerate(prompts, 1):
        try:
            prompt.encode("utf-8")  # bytes that are not UTF-8 arrive as surrogates
        except UnicodeEncodeError as error:
            raise OptionError(f"prompt {number}: expected UTF-8, found {prompt[error.start]!a} at {error.start}") from error
    if empty := [str(number) for number, prompt in enumerate(prompts, 1) if not prompt.strip()]:
        raise OptionError(f"empty prompt: number {', '.join(empty)} of {len(prompts)}")
    return prompts


def read_stdin() -> str:
    """Return the text on stdin without the line end after it."""
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise OptionError(f"stdin: expected UTF-8, found byte {data[error.start]:#04x} at {error.start}") from error


def load(options: Options, prompts: Sequence[str] = ()) -> Loaded:
    """Load the model with its adapter, its tokenizer and the tokens that end an answer; check the prompts before."""
    pretrained = options.model.open()
    tokenizer, template = pretrained.tokenizer, choose_template(options.prompt, pretrained)
    # Raises an error if the template cannot express such a conversation.
    vocabulary = pretrained.checkpoint.model_config.vocab_size
    for prompt in ("?", *prompts):
        ids = encode_prompt([*opening(options), user(prompt)], tokenizer, template=template)
        check_ids(ids, tokenizer, vocabulary, "prompt: ")
    for note in chat_prompt([*opening(options), user("?")], tokenizer)[1] if template == "chat" else ():
        print(f"[{note}]", file=sys.stderr)
    model = pretrained.load(mesh=context_mesh(), progress=sys.stderr.isatty())
    graphdef, state = nnx.split(model)
    try_fused(state)
    eos_ids = pretrained.stop_ids
    if isinstance(model, T5):  # its length has no limit
        longest, start = None, model.config.decoder_start_token_id
    else:
        longest, start = model.max_positions, None
    return Loaded(graphdef, state, tokenizer, template, eos_ids, vocabulary, longest, start)


def choose_template(options: PromptOptions, pretrained: Pretrained) -> Template:
    """Return the template of the prompts, never "auto"; the tokenizer gets the chat template that the options name."""
    tokenizer, metadata = pretrained.tokenizer, pretrained.adapter_metadata
    template = cast(Template | None, options.template or (metadata and metadata.template))
    if options.chat_template is not None:
        tokenizer.chat_template = read_chat_template(options.chat_template, tokenizer)
        template = options.template or "chat"
        if template not in ("auto", "chat"):
            raise OptionError(f"chat_template: expected template chat beside it, found {template}")
    if template in (None, "auto"):
        return "plain" if tokenizer.chat_template is None else "chat"
    return template


def answer_prompts(loaded: Loaded, options: Options, prompts: Sequence[str]) -> None:
    """Answer all prompts as one batch; print one answer as a stream, several one after the other with headings."""
    conversations = [[*opening(options), user(prompt)] for prompt in prompts]
    tokens = [prompt_tokens(loaded, conversation) for conversation in conversations]
    # The continuation of a text may begin with a space, which depends on the text.
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
    """Read questions and print answers until an empty line or the end of stdin."""
    messages = opening(options)
    if loaded.template in ("alpaca", "plain"):
        print(f"[the template {loaded.template} has no history: each question is answered on its own]", file=sys.stderr)
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
        pieces: list[str] = []

        def write_and_record(piece: str, pieces: list[str] = pieces) -> None:
            pieces.append(piece)
            write(piece)

        try:
            with plain_interrupt():
                answer(loaded, options, [prompt_tokens(loaded, messages)], write_and_record)
        except KeyboardInterrupt:  # the incomplete answer stays in the history
            write(" …")
        except ValueError as error:  # too long
            print(f"error: {error}; the conversation starts again", file=sys.stderr)
            messages = opening(options)
            continue
        write("\n")
        messages.append({"role": "assistant", "content": "".join(pieces).strip()})


def answer(
    loaded: Loaded,
    options: Options,
    tokens: list[list[int]],
    write: Callable[[str], None],
    context: Sequence[int] = (),
) -> list[list[int]]:
    """Return the answers to a batch as token ids.

    The answer to the first prompt is passed to `write` piece by piece, and the speed is printed on stderr.
    """
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
    # The first token of each row is the result of the prefill, which includes compilation.
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
    """Return the tokens of a conversation up to the start of the answer, or those of an encoder-decoder's source."""
    tokens = encode_prompt(messages, loaded.tokenizer, template=loaded.template).tolist()
    check_ids(tokens, loaded.tokenizer, loaded.vocabulary, "prompt: ")
    if loaded.decoder_start_id is None:
        return tokens
    if loaded.tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer: expected an end-of-sequence token, found none. {NAME_EOS}")
    return [*tokens, cast(int, loaded.tokenizer.eos_token_id)]


def opening(options: Options) -> list[Message]:
    """Return the messages before the first question: the system message, if any."""
    return [] if options.prompt.system is None else [{"role": "system", "content": options.prompt.system}]


def user(text: str) -> Message:
    """Return a message of the user."""
    return {"role": "user", "content": text}


def write(text: str) -> None:
    """Write text to stdout and flush it."""
    print(text, end="", flush=True)
