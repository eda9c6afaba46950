"""Ctrl-C and SIGTERM in processes of their own, which import no JAX: what they print, and their exit codes.

(About 6 s of CPU.)
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from qlora_jax import cli
from qlora_jax.interrupts import deferred

BOTH = [signal.SIGINT, signal.SIGTERM]
SOON = 15  # seconds, of a program that would go on for a minute
LONG = "interrupts.GRACE_SECONDS = 60.0\n"
BEGIN = """
import dataclasses, os, sys, time
from qlora_jax import cli, interrupts
from qlora_jax.interrupts import cleaning_up, deferred, end_while_importing, plain_interrupt
interrupts.GRACE_SECONDS = 1.0

def ready():
    print("ready", flush=True)

def stubborn(seconds=60.0, begin=lambda: None):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            begin()
            while time.monotonic() < end:  # a signal in the line above would not be caught
                time.sleep(0.01)
        except BaseException:  # as libraries do
            pass

@dataclasses.dataclass
class Options:
    "Options."
    steps: int = 3

def run(main, saved=lambda options: f"{options.steps} steps are saved"):
    sys.exit(cli.run(main, Options, "A test.", [], saved=saved))
"""


def interrupted(program: str, *signals: signal.Signals, pause: float = 2.0) -> tuple[int, str, float]:
    """Send signals to a program once it is ready; return its exit code, what it printed, and the seconds that it took."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    start = time.monotonic()
    for number, one in enumerate(signals):
        if number:
            time.sleep(pause)
        process.send_signal(one)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors, time.monotonic() - start


@pytest.mark.parametrize("number", BOTH)
def test_while_packages_are_imported(number: signal.Signals) -> None:
    code, errors, _ = interrupted("end_while_importing(); ready(); stubborn()", number)
    assert (code, errors) == (128 + number, "\ninterrupted: nothing was begun\n")


@pytest.mark.parametrize("number", BOTH)
def test_a_command_ends_at_once_and_says_what_is_saved(number: signal.Signals) -> None:
    """Also where every exception is caught."""
    code, errors, seconds = interrupted(LONG + "run(lambda options: (ready(), stubborn()))", number)
    assert (code, errors) == (128 + number, "\ninterrupted: 3 steps are saved\n")
    assert seconds < SOON


def test_a_command_whose_state_cannot_be_told() -> None:
    code, errors, _ = interrupted("run(lambda options: (ready(), stubborn()), saved=lambda options: 1 / 0)", signal.SIGINT)
    assert (code, errors) == (130, "\ninterrupted\n")


CLEANING = """
def main(options):
    with cleaning_up():
        try:
            {work}
        finally:
            print("cleaned up", file=sys.stderr)
run(main)
"""


@pytest.mark.parametrize("number", BOTH)
def test_a_block_cleans_up(number: signal.Signals) -> None:
    code, errors, _ = interrupted(CLEANING.format(work="ready(); time.sleep(60)"), number)
    assert (code, errors) == (128 + number, "cleaned up\n\ninterrupted: 3 steps are saved\n")


def test_an_exception_that_is_dropped_does_not_keep_the_process() -> None:
    code, errors, seconds = interrupted(CLEANING.format(work="stubborn(begin=ready)"), signal.SIGINT)
    assert (code, errors) == (130, "\ninterrupted: 3 steps are saved\n")
    assert seconds < SOON

    program = """
class Long:
    def __del__(self):
        ready()
        time.sleep(60)
def main(options):
    with cleaning_up():
        Long()
        time.sleep(60)
run(main)
"""
    code, errors, seconds = interrupted(LONG + program, signal.SIGINT)
    assert (code, errors) == (130, "\ninterrupted: 3 steps are saved\n")
    assert seconds < SOON


def test_an_exception_that_became_another() -> None:
    work = """
            try:
                ready()
                time.sleep(60)
            except BaseException as error:
                raise ValueError("cannot be read") from error"""
    code, errors, _ = interrupted(CLEANING.format(work=work), signal.SIGTERM)
    assert (code, errors) == (143, "cleaned up\n\ninterrupted: 3 steps are saved\n")


def test_a_second_signal_does_not_wait_for_the_cleaning() -> None:
    work = """
            try:
                ready()
                time.sleep(60)
            finally:
                time.sleep(60)"""
    code, errors, seconds = interrupted(LONG + CLEANING.format(work=work), signal.SIGINT, signal.SIGINT)
    assert (code, errors) == (130, "\ninterrupted: 3 steps are saved\n")
    assert seconds < SOON


def test_a_process_whose_threads_go_on_ends_nevertheless() -> None:
    """The interpreter waits for threads, such as one that compiles."""
    program = "import threading; threading.Thread(target=stubborn).start()\n" + CLEANING.format(
        work="ready(); time.sleep(60)"
    )
    code, errors, seconds = interrupted(program, signal.SIGINT)
    assert (code, errors) == (130, "cleaned up\n\ninterrupted: 3 steps are saved\n")
    assert seconds < SOON


STEPS = """
def main(options):
    with deferred("this step first") as signals:
        for step in range(1, 100):
            ready() if step == 1 else None
            time.sleep(0.3) if {short} else stubborn()
            if signals.number is not None:
                break
    raise interrupts.Interrupted(f"stopped after step {{step}}", signals.number)
run(main)
"""


@pytest.mark.parametrize("number", BOTH)
def test_a_step_is_finished_first(number: signal.Signals) -> None:
    code, errors, _ = interrupted(LONG + STEPS.format(short=True), number)
    assert (code, errors) == (128 + number, "\ninterrupted: this step first\n\ninterrupted: stopped after step 1\n")


def test_two_signals_for_one_key_are_one() -> None:
    """As a terminal and a launcher may send them."""
    code, errors, _ = interrupted(LONG + STEPS.format(short=True), signal.SIGINT, signal.SIGINT, pause=0.05)
    assert (code, errors) == (130, "\ninterrupted: this step first\n\ninterrupted: stopped after step 1\n")


def test_the_time_to_clean_up_starts_when_a_step_has_ended() -> None:
    """Also where the step is short and what follows is slow."""
    program = """
def main(options):
    with deferred("this step first") as signals:
        ready()
        while signals.number is None:
            time.sleep(0.01)
    time.sleep(1.0)
    raise interrupts.Interrupted("stopped after step 1", signals.number)
run(main)
"""
    code, errors, _ = interrupted(LONG + program, signal.SIGINT)
    assert (code, errors) == (130, "\ninterrupted: this step first\n\ninterrupted: stopped after step 1\n")


def test_a_second_signal_stops_a_step() -> None:
    code, errors, _ = interrupted(STEPS.format(short=False), signal.SIGINT, signal.SIGINT)
    assert (code, errors) == (130, "\ninterrupted: this step first\n\ninterrupted: 3 steps are saved\n")


def test_a_chat_goes_on() -> None:
    program = """
def main(options):
    with plain_interrupt():
        try:
            ready()
            time.sleep(60)
        except KeyboardInterrupt:
            pass
    time.sleep(1.5)  # longer than the time to clean up
    print("more", file=sys.stderr)
run(main)
"""
    assert interrupted(program, signal.SIGINT)[:2] == (0, "more\n")


def test_a_command_without_a_record_is_interrupted_as_any_program() -> None:
    """It may add a text, as the studies do."""
    program = """
def main(options):
    try:
        ready()
        time.sleep(60)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command continues") from None
run(main, saved=None)
"""
    assert interrupted(program, signal.SIGINT)[:2] == (130, "\ninterrupted: the same command continues\n")


@pytest.mark.parametrize("number", BOTH)
def test_a_command_that_is_done(number: signal.Signals) -> None:
    """The interpreter waits for a thread."""
    program = "import threading; end_while_importing()\nrun(lambda options: threading.Thread(target=late).start())\n"
    program = "def late():\n    time.sleep(0.5)\n    ready()\n    time.sleep(9)\n" + program
    assert interrupted(program, number)[:2] == (128 + number, "\ninterrupted: 3 steps are saved\n")


@dataclasses.dataclass(frozen=True)
class Options:
    """No options."""


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in BOTH], sys.unraisablehook
    assert cli.run(lambda options: 7, Options, "A test.", []) == 7
    with deferred("this step first") as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert signals.number == signal.SIGTERM
    assert ([signal.getsignal(number) for number in BOTH], sys.unraisablehook) == before
