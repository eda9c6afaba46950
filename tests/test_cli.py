"""Options from a TOML file and from flags: which wins, and that nothing misspelt or of a wrong type passes."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import pytest

from qlora_jax.cli import parse, run, to_dict
from qlora_jax.config_file import from_toml
from qlora_jax.errors import OptionError
from qlora_jax.finetune import Options as FinetuneOptions
from qlora_jax.renamed_options import RENAMED_OPTIONS, replace_old_names


@dataclasses.dataclass(frozen=True)
class Inner:
    """Some options."""

    rate: float = 0.5
    """A rate."""
    count: int = 3
    """A count."""
    kind: Literal["a", "b"] = "a"
    """One of two."""
    names: tuple[str, ...] = ("x",)
    """Names."""
    limit: int | None = None
    """A limit, or none."""
    share: float | None = None
    """A share, or none."""

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count: expected at least 0, found {self.count}")


@dataclasses.dataclass(frozen=True)
class Outer:
    """More options."""

    place: Path = Path("here")
    """A path."""
    fast: bool = False
    """A switch."""


@dataclasses.dataclass(frozen=True)
class Options:
    """All options."""

    inner: Inner = dataclasses.field(default_factory=Inner)
    outer: Outer = dataclasses.field(default_factory=Outer)


EVERYTHING = """
[inner]
rate = 0.25
count = 7
kind = "b"
names = ["p", "q"]
limit = 9
share = 1
[outer]
place = "there/it is"
fast = true
"""


def toml(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def parsed(*arguments: object) -> Options:
    return parse(Options, description="A test.", arguments=[str(argument) for argument in arguments])


def test_the_defaults_are_those_of_the_dataclasses() -> None:
    assert parsed() == Options()


def test_a_file_becomes_the_dataclass(tmp_path: Path) -> None:
    expected = Options(Inner(0.25, 7, "b", ("p", "q"), 9, 1.0), Outer(Path("there/it is"), True))
    found = from_toml(Options, toml(tmp_path, EVERYTHING))
    assert found == expected
    assert type(found.inner.share) is float, "a whole number where a float is meant"
    assert type(found.inner.limit) is int
    assert from_toml(Options, toml(tmp_path, "[inner]\nrate = 2\n")) == Options(Inner(rate=2.0))
    assert from_toml(Options, toml(tmp_path, "")) == Options()


def test_flags_overrule_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, EVERYTHING)
    found = parsed("--config", path, "--rate", "0.75", "--names", "r", "--place", "elsewhere")
    assert found == Options(Inner(0.75, 7, "b", ("r",), 9, 1.0), Outer(Path("elsewhere"), True))
    assert parsed("--rate", "0.75", "--config", path).inner == Inner(0.75, 7, "b", ("p", "q"), 9, 1.0)
    assert parsed("--count", "4") == Options(Inner(count=4))


def test_the_equals_form(tmp_path: Path) -> None:
    path = toml(tmp_path, EVERYTHING)
    assert parsed(f"--config={path}", "--count=1") == parsed("--config", path, "--count", "1")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--names", "a", "--names", "b"], ("a", "b")),
        (["--names", "a", "b", "--count", "1", "--names=c", "--names", "d", "e"], ("a", "b", "c", "d", "e")),
        (["--names=a=b", "--names", "--rate", "2", "--names", "c"], ("a=b", "c")),
    ],
)
def test_the_values_of_repeated_lists_add_up(arguments: list[str], names: tuple[str, ...]) -> None:
    assert parsed(*arguments).inner.names == names


def test_repeated_tables_and_sources_add_up() -> None:
    flags = ["--rank-pattern", "q_proj", "4", "--data", "a.jsonl", "--rank-pattern", "v_proj", "8", "--data=b.jsonl"]
    read = parse(FinetuneOptions, description=None, arguments=flags)
    assert read.lora.rank_pattern == {"q_proj": 4, "v_proj": 8}
    assert read.data.data == ("a.jsonl", "b.jsonl")
    assert parse(FinetuneOptions, description=None, arguments=["--data", "a.jsonl"]).data.sources == ("a.jsonl",)


def test_lists_of_flags_replace_those_of_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, EVERYTHING)
    assert parsed("--config", path, "--names", "r", "--names", "s").inner.names == ("r", "s")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "1", "--count", "2"], "--count: expected once, found twice: --count 1 and --count 2"),
        (["--count=1", "--rate", "2", "--count=1"], "--count: expected once, found twice: --count=1 and --count=1"),
        (["--fast", "--no-fast"], "--no-fast: expected once, found twice: --fast and --no-fast"),
        (["--limit", "1", "--limit", "2"], "--limit: expected once, found twice"),
        (["--place", "a", "--place", "b"], "--place: expected once, found twice"),
    ],
)
def test_a_repeated_option_of_one_value_is_an_error(arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError) as error:
        parsed(*arguments)
    assert str(error.value).startswith(message)


def test_dashes_are_underscores(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Long:
        two_words: int = 0

    assert from_toml(Long, toml(tmp_path, "two-words = 2")).two_words == 2
    assert from_toml(Long, toml(tmp_path, "two_words = 2")).two_words == 2
    with pytest.raises(ValueError, match="given twice"):
        from_toml(Long, toml(tmp_path, "two_words = 2\ntwo-words = 3"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[iner]\nrate = 1", "unknown key iner; did you mean inner?"),
        ("[inner]\nrat = 1", "unknown key inner.rat; did you mean inner.rate?"),
        ("[inner]\nzzz = 1", "unknown key inner.zzz; known: rate, count, kind"),
        ("rate = 1", "unknown key rate; known: inner, outer"),
        ("inner = 3", "inner: expected a table, found 3"),
        ('[inner]\nrate = "fast"', "inner.rate: expected float, found 'fast'"),
        ("[inner]\nrate = true", "inner.rate: expected float, found True"),
        ("[inner]\ncount = 1.5", "inner.count: expected int, found 1.5"),
        ("[inner]\ncount = false", "inner.count: expected int, found False"),
        ("[inner]\nlimit = 1.5", "inner.limit: expected int | None, found 1.5"),
        ('[inner]\nkind = "c"', "inner.kind: expected one of 'a', 'b', found 'c'"),
        ('[inner]\nnames = "x"', "inner.names: expected"),
        ('[inner]\nnames = ["x", 1]', "inner.names: expected"),
        ("[outer]\nplace = 1", "outer.place: expected Path, found 1"),
        ("[outer]\nfast = 1", "outer.fast: expected bool, found 1"),
        ("[inner]\ncount = -1", "count: expected at least 0, found -1"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, text: str, expected: str) -> None:
    path = toml(tmp_path, text)
    with pytest.raises(ValueError, match="config file") as error:
        from_toml(Options, path)
    assert str(error.value).startswith(f"config file {path}: {expected}")
    assert "\n" not in str(error.value)


def test_all_problems_are_in_one_message(tmp_path: Path) -> None:
    path = toml(tmp_path, '[inner]\nrat = 1\ncount = "x"\n[outer]\nfast = 1\nplaces = "y"\n[more]\n')
    with pytest.raises(ValueError, match=r"unknown key inner\.rat") as error:
        from_toml(Options, path)
    for part in ("inner.count", "outer.fast", "did you mean outer.place?", "unknown key more"):
        assert part in str(error.value)
    assert str(error.value).count(";") >= 4


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config file .*none\.toml: no such file"):
        parsed("--config", tmp_path / "none.toml")
    with pytest.raises(ValueError, match=r"run\.toml: not valid TOML: .*line 2"):
        parsed("--config", toml(tmp_path, "[inner]\nrate = \n"))
    (tmp_path / "run.toml").write_bytes(b"[inner]\n# \xff\n")
    with pytest.raises(ValueError, match=r"run\.toml: expected UTF-8, found"):
        parsed("--config", tmp_path / "run.toml")
    with pytest.raises((ValueError, OSError), match=str(tmp_path)):
        parsed("--config", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [(["--config"], "none"), (["--config="], "none"), (["--config", "a", "--config=b"], "two")],
)
def test_config_takes_one_file(arguments: list[str], found: str) -> None:
    with pytest.raises(ValueError, match=f"--config: expected one file, found {found}"):
        parsed(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [["--rat", "1"], ["--rate", "fast"], ["--count", "1.5"], ["--count"], ["stray"], ["--count", "-1"]],
)
def test_flags_that_do_not_fit(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parsed(*arguments)
    assert exit_.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert arguments[0] in shown.err or "count: expected at least 0, found -1" in shown.err
    assert "Traceback" not in shown.err


def test_help_has_every_option_and_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parsed("--help")
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for part in ("--rate", "A rate.", "--kind", "--place", "--config FILE.toml", "A test."):
        assert part in shown
    assert "--inner.rate" not in shown


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("what is wrong"), 1, "error: what is wrong\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, "error: [Errno 2] No such file: 'x'\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
        (KeyboardInterrupt("stopped"), 130, "\ninterrupted: stopped\n"),
    ],
)
def test_run_turns_errors_into_a_line(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(options: Options) -> None:
        assert options.inner.count == 4
        raise error

    monkeypatch.setattr("sys.argv", ["script", "--count", "4"])
    assert run(main, Options, None) == code
    assert capsys.readouterr().err == text


def test_run_does_not_hide_faults_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["script"])
    with pytest.raises(ZeroDivisionError):
        run(lambda options: 1 / 0, Options, None)


def test_a_record_is_plain_json(tmp_path: Path) -> None:
    options = from_toml(Options, toml(tmp_path, EVERYTHING))
    record: dict[str, Any] = to_dict(options)
    assert json.loads(json.dumps(record)) == record
    assert record["outer"] == {"place": "there/it is", "fast": True}
    assert record["inner"]["names"] == ["p", "q"]


def test_a_mapping_in_a_file_is_overruled_as_a_whole(tmp_path: Path) -> None:
    """A key may be the name of an option, and two mappings may share one."""
    (tmp_path / "run.toml").write_text(
        "[lora]\nrank_pattern = { q_proj = 8, rank = 3 }\nalpha_pattern = { q_proj = 64 }\n", encoding="utf-8"
    )
    config = ["--config", str(tmp_path / "run.toml")]
    read = parse(FinetuneOptions, description=None, arguments=config).lora
    assert (read.rank_pattern, read.alpha_pattern) == ({"q_proj": 8, "rank": 3}, {"q_proj": 64.0})
    read = parse(FinetuneOptions, description=None, arguments=[*config, "--rank-pattern", "v_proj", "4"]).lora
    assert (read.rank_pattern, read.alpha_pattern) == ({"v_proj": 4}, {"q_proj": 64.0})


def test_lists_and_tables_say_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[watch]\nreport_to = ["mlflow"]\n[lora]\nrank_pattern = 3\n', encoding="utf-8")
    with pytest.raises(ValueError, match="expected a list of one of 'tensorboard', 'wandb', found") as error:
        parse(FinetuneOptions, description=None, arguments=["--config", str(tmp_path / "run.toml")])
    assert "lora.rank_pattern: expected a table of int, found 3" in str(error.value)


@dataclasses.dataclass(frozen=True)
class Renamed:
    """Options of which one has a new name."""

    embedding_storage: str = "none"
    """A storage."""


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Such options in a group."""

    model: Renamed = dataclasses.field(default_factory=Renamed)


@pytest.mark.parametrize("flag", [["--quantize-tables", "int8"], ["--quantize-tables=int8"], ["--quantize_tables", "int8"]])
def test_a_renamed_flag_names_the_new_one(flag: list[str]) -> None:
    with pytest.raises(OptionError, match=r"--quantize.tables: was renamed to --embedding-storage$"):
        parse(Grouped, description=None, arguments=flag)
    assert parse(Grouped, description=None, arguments=["--embedding-storage", "int8"]).model == Renamed("int8")


def test_a_renamed_key_names_the_new_one(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"model\.quantize_tables: was renamed to model\.embedding_storage$"):
        from_toml(Grouped, toml(tmp_path, '[model]\nquantize_tables = "int8"\n'))


def test_every_renamed_option_is_one_of_the_job_or_a_command() -> None:
    """An entry of the table whose new name does not exist could not help anybody."""
    record = to_dict(FinetuneOptions())
    known = {*record, *(name for group in record.values() for name in group)}
    assert set(RENAMED_OPTIONS.values()) <= known
    assert not set(RENAMED_OPTIONS) & known


def test_a_record_with_old_names_is_read_with_the_new_ones() -> None:
    assert replace_old_names({"model": {"quantize_tables": "int8", "x": 1}}) == {
        "model": {"embedding_storage": "int8", "x": 1}
    }
    assert replace_old_names({"quantize_tables": 1, "embedding_storage": 2}) == {"embedding_storage": 2}
    old = {"data": {"on_long": "truncate", "split": "truncate"}}
    assert replace_old_names(old) == {"data": {"on_long": "cut", "split": "truncate"}}


@pytest.mark.parametrize("arguments", [["--on-long", "truncate"], ["--on-long=truncate"]])
def test_a_renamed_value_names_the_new_one(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(OptionError, match=r"^--on-long truncate: was renamed to --on-long cut$"):
        parse(FinetuneOptions, description=None, arguments=arguments)
    with pytest.raises(OptionError, match=r"data\.on_long: truncate was renamed to cut$"):
        from_toml(FinetuneOptions, toml(tmp_path, '[data]\non_long = "truncate"\n'))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--template", "llama3"],
            "--template: expected one of auto, .*, found 'llama3'; did you mean --chat-template llama3\\?",
        ),
        (["--on-long=trim"], "--on-long: expected one of split, cut, error, drop, found 'trim'"),
    ],
)
def test_a_value_that_is_no_choice_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=f"^{message}$"):
        parse(FinetuneOptions, description=None, arguments=arguments)


def test_required_options_come_from_the_file_or_from_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @dataclasses.dataclass(frozen=True)
    class Required:
        one: str
        two: str
        three: int = 3

    config = ["--config", str(toml(tmp_path, 'one = "a"\nthree = 4\n'))]
    assert parse(Required, description=None, arguments=[*config, "--two", "b"]) == Required("a", "b", 4)
    assert parse(Required, description=None, arguments=["--one", "a", "--two", "b"]) == Required("a", "b")
    with pytest.raises(SystemExit):
        parse(Required, description=None, arguments=config)
    assert "--two" in capsys.readouterr().err


@pytest.mark.parametrize(("result", "code"), [(None, 0), (Path("x"), 0), (0, 0), (1, 1)])
def test_the_exit_code_is_what_main_returns(result: object, code: int) -> None:
    assert run(lambda options: result, Options, None, []) == code
