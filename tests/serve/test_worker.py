"""The engine's thread: a grammar that takes long to compile delays nobody else; about 2 CPU-seconds."""

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
from test_engine import Successors, make, request

from qlora_jax.errors import OptionError
from qlora_jax.serve.row_sampling import all_allowed
from qlora_jax.serve.scheduler import BusyError, Limits
from qlora_jax.serve.worker import StoppedError, Worker


class Only:
    """A grammar of one token, again and again."""

    def __init__(self, token: int) -> None:
        self.token = token

    def copy(self) -> "Only":
        return Only(self.token)

    def allowed(self) -> np.ndarray:
        mask = 0 * all_allowed(1, 32)[0]
        mask[0] = 1 << self.token
        return mask

    def accept(self, token: int) -> bool:
        assert token == self.token
        return False


def test_a_grammar_that_compiles_slowly_delays_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling, go_on = threading.Event(), threading.Event()

    def constrain(given: Any) -> Only:
        if given == "wrong":
            raise OptionError("a wrong grammar")
        compiling.set()
        assert go_on.wait(60)
        return Only(given)

    worker = Worker(make(Successors(), Limits(rows=3, capacity=64, chunk=8), 32, constrain=constrain))
    worker.start()
    found: dict[str, list[int]] = {"slow": [], "other": []}
    ended = {name: threading.Event() for name in found}

    def ask(name: str, one: Any) -> Any:
        def listen(event: Any) -> None:
            found[name] += event.tokens
            if event.finish is not None and not worker.engine.running(event.ticket):
                ended[name].set()

        return worker.submit(one, listen)

    slow = ask("slow", dataclasses.replace(request([1], 3, grammar=9), count=2))
    assert compiling.wait(60)
    late = ask("other", request([1], 3, grammar="wrong"))
    ask("other", request([4], 3)).result(60)
    assert ended["other"].wait(60)  # while the grammar is still being compiled
    assert found["other"] == [5, 6, 7]
    assert not slow.done()
    monkeypatch.setattr("qlora_jax.serve.worker._GRAMMAR_SECONDS", -1.0)
    waited = ask("other", request([1], 3, grammar=9))
    go_on.set()
    assert ended["slow"].wait(60)
    assert found["slow"] == [9] * 6
    with pytest.raises(OptionError, match="a wrong grammar"):
        late.result(60)
    with pytest.raises(BusyError, match="grammars of other requests"):
        waited.result(60)
    assert worker.stop(60)
    with pytest.raises(StoppedError):
        ask("slow", request([1], 3, grammar=9)).result(60)
