"""The records of a run, read back as JSON and as an image."""

import json
import math
from pathlib import Path

import pytest
from matplotlib.image import imread

from qlora_jax.train import MetricsLog, best_evaluation, peak_memory_bytes, perplexity, plot_losses


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, count: int, *, resume_at: int = 0) -> MetricsLog:
    log = MetricsLog(path, resume_at=resume_at)
    for step in range(resume_at + 1 if resume_at else 0, count + 1):
        log.add({"step": step, "loss": 1 / (step + 1)})
    log.close()
    return log


def test_a_row_is_in_the_file_as_soon_as_it_is_added(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_at=0)
    log.add({"step": 1, "loss": 0.1 + 0.2})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "loss": 0.1 + 0.2}, "to the last bit"
    log.close()


def test_a_resumed_run_drops_later_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 7)
    log = write(path, 9, resume_at=4)
    assert steps(path) == list(range(10))
    assert [row["step"] for row in log.rows] == list(range(10)), "the plot sees all"


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_cut_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    """A kill may leave any part of a line."""
    path = tmp_path / "metrics.jsonl"
    write(path, 5)
    text = path.read_text()
    path.write_text(text[:-cut])
    write(path, 6, resume_at=4)
    assert steps(path) == list(range(7))
    path.write_text(text[:-cut])
    write(path, 5, resume_at=5)
    assert steps(path)[:5] == list(range(5))


@pytest.mark.parametrize(
    "damage",
    [
        b"\x00" * 40 + b"\n",  # as after a power failure
        b'{"step": 6, "loss": 0.\n',
        b"[1]\n",
        b'{"loss": 1.0}\n',
        b'{"step": true}\n',
        b'{"step": "6"}\n',
        b'{"step": 6, "eval_loss": "low"}\n',
        b'{"step": 6, "loss": null}\n',
        b'{"step": 6, "text": "\xff"}\n',
        b"[" * 100_000 + b"\n",
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_a_damaged_line_does_not_block_a_resume(
    tmp_path: Path, damage: bytes, last: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 5)
    whole = path.read_bytes()
    path.write_bytes(whole + damage if last else damage + whole)
    log = write(path, 8, resume_at=5)
    assert steps(path) == list(range(9))
    assert best_evaluation(log.rows) == (None, 0)
    assert f"left out 1 damaged lines, the first is line {7 if last else 1}." in caplog.text


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_at=0)
    log.close()
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        log.add({"step": 1})
    log.close()


def test_a_cut_line_that_ends_like_a_whole_one(tmp_path: Path) -> None:
    """Texts in rows may hold any character."""
    path = tmp_path / "samples.jsonl"
    path.write_text('{"step": 0, "answer": "a"}\n{"step": 1, "answer": "{b}')
    log = MetricsLog(path, resume_at=1)
    log.close()
    assert log.rows == [{"step": 0, "answer": "a"}]


def test_listeners_get_new_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert write(path, 5).reached == -1
    log, heard = MetricsLog(path, resume_at=3), []
    log.listeners.append(heard.append)
    assert log.reached == 5, "of the run before, though its rows 4 and 5 are dropped"
    log.add({"step": 4})
    log.close()
    assert heard == [{"step": 4}]
    anew = MetricsLog(path, resume_at=0)
    anew.close()
    assert (anew.reached, anew.rows) == (4, [])


def test_a_run_from_the_start_keeps_no_row(tmp_path: Path) -> None:
    """One that was killed before its first checkpoint begins with step 0 once more: it must not stand there twice."""
    path = tmp_path / "metrics.jsonl"
    write(path, 2)
    write(path, 3)
    assert steps(path) == [0, 1, 2, 3]


def test_a_kill_while_it_opens_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 5)

    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(path, resume_at=4)
    assert steps(path) == list(range(6))


def test_the_plot(tmp_path: Path) -> None:
    """An image with both curves, and with one, or without any."""
    training = [{"step": step, "loss": 3 - step / 10} for step in range(1, 20)]
    held_out = [{"step": step, "eval_loss": 3.0} for step in (0, 10)]
    sizes = set()
    for number, rows in enumerate(([*held_out, *training], training, held_out)):
        plot_losses(rows, tmp_path / f"{number}.png")
        image = imread(tmp_path / f"{number}.png")
        sizes.add(image.shape)
        assert image.std() > 0.01
    assert len(sizes) == 1


def test_peak_memory_and_perplexity() -> None:
    pages = Path("/proc/self/statm")
    if pages.exists():
        assert peak_memory_bytes() > 4096 * int(pages.read_text().split()[1]) / 4
    assert perplexity(1.0) == math.e
    assert perplexity(1000.0) == math.inf
