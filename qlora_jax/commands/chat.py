"""Chat with a model and its adapters in the terminal, with a server or without one.

    python scripts/chat.py
    python scripts/chat.py --adapters alice=runs/alice/adapter --tenant alice --compare
    QLORA_JAX_KEY=sk-… python scripts/chat.py --url http://127.0.0.1:8000/v1

Without --url, the model is loaded and served on this machine for the time of the chat, with a key that nobody else has; the
options of the model and of the adapters are those of serve.py. Ctrl-C stops an answer, Ctrl-D ends the chat.

    /tenant NAME    go on with another model; without a name, show all
    /compare NAME   answer twice, side by side with this model (the base, without a name); again, to end it
    /system TEXT    set the system message; without a text, remove it
    /save FILE      add the conversation to a file, as a row of data to train on
    /clear          begin a new conversation
    /help           show this list
"""

import contextlib
import dataclasses
import json
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qlora_jax import cli
from qlora_jax.adapters.pretrained import PretrainedOptions
from qlora_jax.commands import serve
from qlora_jax.errors import OptionError
from qlora_jax.interrupts import Interrupted, plain_interrupt
from qlora_jax.serve.api_keys import ApiKey, new_key
from qlora_jax.serve.client import AnswerStream, Client, ServerError
from qlora_jax.serve.scheduler import Limits

_HELP = "    /tenant" + (__doc__ or "").partition("    /tenant")[2].rstrip()
_KEY = "QLORA_JAX_KEY"


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command."""

    model: PretrainedOptions = dataclasses.field(default_factory=PretrainedOptions)
    adapter: serve.AdapterOptions = dataclasses.field(default_factory=serve.AdapterOptions)
    url: str | None = None
    """Address of a server, whose models are used instead; its key is read from the environment (QLORA_JAX_KEY)."""
    tenant: str | None = None
    """Model to begin with; the first adapter if left out, or the base if there is none."""
    system: str = ""
    """System message."""
    compare: bool = False
    """Answer side by side with the base."""
    max_tokens: int = 512
    """Most tokens of an answer."""
    temperature: float = 0.7
    """0 chooses the most likely token."""
    capacity: int = 2048
    """Most tokens of a conversation, without --url."""
    chat_template: str | None = None
    """Chat template instead of the tokenizer's: a file, or a name such as chatml."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise OptionError(f"max_tokens: expected at least 1, found {self.max_tokens}")
        if not 0 <= self.temperature <= 2:
            raise OptionError(f"temperature: expected 0 to 2, found {self.temperature}")


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.run(run, Options, __doc__, arguments, program=program)


def run(options: Options) -> int:
    """Chat until the end of stdin; return 0."""
    with _client(options) as client:
        Chat(client, options, Console(highlight=False)).run()
    return 0


@contextlib.contextmanager
def _client(options: Options) -> Iterator[Client]:
    """Return a client of the server, or of one that is started for it."""
    if options.url is not None:
        yield Client(options.url, os.environ.get(_KEY, ""))
        return
    key, _ = new_key("chat")
    keys = (ApiKey.of("chat", key),)
    listening = serve.listen(serve.ServerOptions(port=0))
    served = serve.Options(
        model=options.model,
        adapter=options.adapter,
        engine=Limits(rows=2, capacity=options.capacity),
        chat_template=options.chat_template,
    )
    server, _ = serve.start(served, keys, listening)
    try:
        yield Client(server.address, key)
    finally:
        server.stop(0.0)


class Chat:
    """A conversation in a terminal.

    Attributes:
        tenant: the model that answers.
        beside: the model that answers beside it; None: none does.
        system: the system message.
    """

    def __init__(self, client: Client, options: Options, console: Console) -> None:
        """Begin a conversation.

        Raises:
            OptionError: the server has no models, or not the one to begin with.
            ServerError: the server cannot be reached.
        """
        self._client, self._options, self._console = client, options, console
        self._models = client.models()
        if not self._models:
            raise OptionError("url: expected a server with models for this key, found none")
        self.tenant = self._models[:2][-1] if options.tenant is None else self._known(options.tenant)
        self.beside = self._models[0] if options.compare else None
        self.system = options.system
        self._messages: list[dict[str, Any]] = []
        self._beside: list[dict[str, Any]] = []

    def run(self) -> None:
        """Read messages and commands until the end of stdin."""
        self._note(f"{self.tenant}; /help shows the commands, Ctrl-D ends the chat")
        while True:
            try:
                with plain_interrupt():
                    line = input("> ").strip()
            except EOFError:
                print()
                return
            except Interrupted:
                raise
            except KeyboardInterrupt:
                print()
                self._note("Ctrl-D ends the chat")
                continue
            try:
                if line.startswith("/"):
                    self._command(*(line[1:].split(maxsplit=1) or [""]))
                elif line:
                    self._ask(line)
            except (OptionError, ServerError, OSError) as error:
                self._console.print(Text(f"error: {error}", style="red"))

    def _command(self, name: str, value: str = "") -> None:
        if name == "tenant" and not value:
            self._models = self._client.models()
            self._note("\n".join(f"{'*' if model == self.tenant else ' '} {model}" for model in self._models))
        elif name == "tenant":
            self.tenant = self._known(value)
        elif name == "compare":
            self.beside = self._known(value) if value else None if self.beside else self._models[0]
            self._beside = list(self._messages)
            self._note(f"beside {self.beside}" if self.beside else "nothing beside")
        elif name == "system":
            self.system = value
        elif name == "save" and value:
            self._save(Path(value).expanduser())
        elif name == "clear":
            self._messages, self._beside = [], []
        elif name == "help":
            self._note(_HELP)
        else:
            raise OptionError(f"/{name}: expected a command as /help shows them")

    def _known(self, name: str) -> str:
        if name not in self._models:
            self._models = self._client.models()  # it may have come meanwhile
        if name not in self._models:
            raise OptionError(f"tenant: expected one of {', '.join(self._models)}, found {name}")
        return name

    def _save(self, path: Path) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": self._with_system(self._messages)}, ensure_ascii=False) + "\n")
        self._note(f"added to {path}")

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}, *messages] if self.system else list(messages)

    def _ask(self, question: str) -> None:
        """Ask and show the answers; what was written of one that was stopped stays in the conversation."""
        asked = [(self.tenant, self._messages)] + ([(self.beside, self._beside)] if self.beside else [])
        for _, messages in asked:
            messages.append({"role": "user", "content": question})
        answers = _Answers()
        try:
            with plain_interrupt():
                for model, messages in asked:
                    fields = {"max_completion_tokens": self._options.max_tokens, "temperature": self._options.temperature}
                    answers.add(self._client.ask(model, self._with_system(messages), **fields))
                self._show(answers, [model for model, _ in asked])
        except Interrupted:  # SIGTERM ends the chat
            raise
        except KeyboardInterrupt:
            self._note("stopped")
        finally:
            answers.close()
            for number, (_, messages) in enumerate(asked):
                text = answers.texts[number] if number < len(answers.texts) else ""
                if text:
                    messages.append({"role": "assistant", "content": text})
                else:
                    messages.pop()
        for error in answers.errors:
            raise error

    def _show(self, answers: "_Answers", models: list[str]) -> None:
        if len(models) == 1:
            for _, piece in answers:
                self._console.print(Text(_printable(piece)), end="")
            self._console.print()
        elif self._console.is_terminal:
            with Live(console=self._console, refresh_per_second=8) as live:
                for _ in answers:
                    live.update(_columns(models, answers.texts))
        else:
            for _ in answers:
                pass
            for model, text in zip(models, answers.texts, strict=True):
                self._console.print(Text(f"[{model}] {_printable(text)}"))

    def _note(self, text: str) -> None:
        self._console.print(Text(text, style="dim"))


class _Answers:
    """Answers that are read at the same time.

    Attributes:
        texts: what has arrived.
        errors: those of the server.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.errors: list[ServerError] = []
        self._streams: list[AnswerStream] = []
        self._pieces: queue.SimpleQueue[tuple[int, str | ServerError | None]] = queue.SimpleQueue()

    def add(self, stream: AnswerStream) -> None:
        """Read a stream, too."""
        number = len(self._streams)
        self._streams.append(stream)
        self.texts.append("")
        threading.Thread(target=self._read, args=(number, stream), daemon=True).start()

    def _read(self, number: int, stream: AnswerStream) -> None:
        try:
            for piece in stream:
                self._pieces.put((number, piece))
        except ServerError as error:
            self._pieces.put((number, error))
        self._pieces.put((number, None))

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Yield (the number of the answer, the next piece) until all have ended."""
        running = len(self._streams)
        while running:
            number, piece = self._pieces.get()
            if piece is None:
                running -= 1
            elif isinstance(piece, ServerError):
                self.errors.append(piece)
            else:
                self.texts[number] += piece
                yield number, piece

    def close(self) -> None:
        """End the answers."""
        for stream in self._streams:
            stream.close()


def _columns(models: Sequence[str], texts: Sequence[str]) -> Table:
    table = Table(expand=True)
    for model in models:
        table.add_column(Text(model), ratio=1)
    table.add_row(*(Text(_printable(text)) for text in texts))
    return table


def _printable(text: str) -> str:
    """Return a text without control characters, which could give orders to the terminal."""
    return "".join(one for one in text if one.isprintable() or one in "\n\t")
