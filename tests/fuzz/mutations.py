"""Damages the bytes of a file, at random but the same for the same draws: text formats, and bytes of any format.

Of JSON and TOML the structure is damaged: values of other types, sizes and signs, names that are missing or twice. The bytes
are damaged as well: flipped, cut out, put in twice, cut off. A mutation returns the new bytes and what was done, in words.
The formats that are no text are in binaries.py.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Mutation = Callable[[bytes, random.Random], tuple[bytes, str]]

DIGITS, DEEP, MANY = "@DIGITS@", "@DEEP@", "@MANY@"  # replaced in the text: Python's json does not write such values
ENDLESS = (
    "(a+)+$",
    "(.*)*x",
    "([a-z._]+)+!",
    "(([a-z]|[a-z_.])*)*0",
    r"((\w|\.)+)+\d$",
    "(.*.*.*)*Q",
    "(",
    "[",
    "*",
    "(?P<a>",
    "",
)
VALUES: list[Any] = [
    *(None, True, False, "", {}, [], [[]], {"a": 1}, [None], 0, 1, -1, 2, 10**7, 10**9, 2**31 - 1, 2**31, 2**63, -(2**63)),
    *(10**400, 0.0, -0.5, 0.1, 1e-300, 1e308, 64.0, float("nan"), float("inf"), float("-inf"), "64", "NaN", "text", "\x00"),
    *("\ud83d", "../../etc/passwd", "/dev/zero", "a" * 20_000, "é" * 300, "{{", "%s", *ENDLESS, DIGITS, DEEP, MANY),
    *([1, 2, 3], ["a"] * 50, [10**9], [-1], [1.5], [[1]], {"rope_type": "yarn"}, {"content": 5}, {"": ""}, [True]),
    *({"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}, [[0, 10**9]]),
    *({"type": "Regex", "Regex": "(a+)+$"}, {"Regex": "(.*)*x"}, {"a": {"b": {"c": []}}}, ["x"] * 5000),
]


def mutate_bytes(content: bytes, draws: random.Random, *, first: int = 0, last: int | None = None) -> tuple[bytes, str]:
    """Change one to four places between `first` and `last`."""
    data, last, done = bytearray(content), len(content) if last is None else last, []
    for _ in range(draws.randint(1, 4)):
        at = draws.randrange(first, max(min(last, len(data)), first + 1))
        if not data[at : at + 1]:
            break
        kind = draws.choice(["flip", "random", "cut", "twice", "fill", "end", "swap"])
        match kind:
            case "flip":
                data[at] ^= 1 << draws.randrange(8)
            case "random":
                data[at : at + 8] = draws.randbytes(8)
            case "cut":
                del data[at : at + draws.randint(1, 40)]
            case "twice":
                data[at:at] = data[at : at + draws.randint(1, 40)]
            case "fill":
                data[at : at + 8] = draws.choice([b"\xff" * 8, b"\0" * 8, b'"[{1e999', b"99999999", b"\xc3(\xff\xfe[[[["])
            case "end":
                del data[at:]
            case "swap":
                other, size = draws.randrange(first, len(data)), draws.randint(1, 32)
                data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
        done.append(f"{kind} at {at}")
    return bytes(data), ", ".join(done) or "nothing"


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (object or list, key or index) of each value in a value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def mutate_value(value: Any, draws: random.Random, keys: tuple[str, ...] = ()) -> tuple[Any, str]:
    """Change one to three places of a value as JSON has it; `keys` are names that its format knows."""
    value, done = copy.deepcopy(value), []
    for _ in range(draws.choice([1, 1, 1, 2, 3])):
        found = list(places(value))
        if not found:
            return draws.choice(VALUES), "another value"
        if len(found) > 60 and draws.random() < 0.5:  # else the long lists of a vocabulary draw nearly everything
            found = [place for place in found if place[0] is value] or found
        (owner, key), new = draws.choice(found), draws.choice(VALUES)
        kind = draws.choice(
            ["drop", "null", "value", "value", "value", "other", "rename", "new", "new", "wrap", "scale", "repeat"]
        )
        match kind:
            case "drop":
                del owner[key]
            case "null":
                owner[key] = None
            case "value":
                owner[key] = copy.deepcopy(new)
            case "other":
                source, at = draws.choice(found)
                owner[key] = copy.deepcopy(source[at]) if _has(source, at) else None
            case "rename" if isinstance(owner, dict):
                owner[draws.choice([*keys, *(text for text in VALUES if isinstance(text, str))])] = owner.pop(key)
            case "new" if keys and isinstance(value, dict):
                key = draws.choice(keys)
                value[key] = copy.deepcopy(draws.choice([new, draws.choice(found)[0], {key: new}, [new]]))
            case "wrap":
                owner[key] = draws.choice([[owner[key]], {str(key): owner[key]}, [owner[key]] * 2, str(owner[key])])
            case "scale" if isinstance(owner[key], int | float):
                owner[key] = owner[key] * draws.choice([-1, 0, 2, 1000, 10**6, 0.5, 1.0]) + draws.choice([0, 1, -1])
            case "repeat" if isinstance(owner[key], list | str):
                owner[key] = owner[key] * draws.choice([2, 3, 100])
        done.append(f"{kind} {str(key)[:40]!r}: {str(_get(owner, key))[:60]!r}")
    return value, ", ".join(done)


def _has(owner: Any, key: Any) -> bool:
    return key in owner if isinstance(owner, dict) else isinstance(owner, list) and isinstance(key, int) and key < len(owner)


def _get(owner: Any, key: Any) -> Any:
    return owner[key] if _has(owner, key) else "none"


def json_text(value: Any) -> bytes:
    """Return a value as JSON, with numbers of many digits, deep lists and many keys in the places that stand for them."""
    text = json.dumps(value)
    text = text.replace(f'"{DIGITS}"', "9" * 6000).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)
    return text.replace(f'"{MANY}"', "{" + ",".join(f'"k{number}":{number}' for number in range(20_000)) + "}").encode()


def mutate_json(*keys: str) -> Mutation:
    """Return the mutation of a JSON file whose format knows these keys."""

    def mutate(content: bytes, draws: random.Random) -> tuple[bytes, str]:
        if draws.random() < 0.2:
            return mutate_bytes(content, draws)
        value, done = mutate_value(json.loads(content), draws, keys)
        text = json_text(value)
        if draws.random() < 0.05 and text.startswith(b"{") and keys:
            key, twice = draws.choice(keys), draws.choice([b"null", b"[]", b"-1", b"1e999"])
            return b'{"' + key.encode() + b'": ' + twice + b", " + text[1:], f"{done}, {key} twice"
        return text, done

    return mutate


def mutate_lines(*keys: str) -> Mutation:
    """Return the mutation of a file of JSON lines: one to three lines."""

    def mutate(content: bytes, draws: random.Random) -> tuple[bytes, str]:
        if draws.random() < 0.2:
            return mutate_bytes(content, draws)
        lines, done = content.splitlines(keepends=True), []
        for _ in range(draws.randint(1, 3)):
            number = draws.randrange(len(lines))
            try:
                value, what = mutate_value(json.loads(lines[number]), draws, keys)
            except (ValueError, RecursionError):  # changed before
                continue
            lines[number] = json_text(value) + draws.choice([b"\n", b"\n", b"\n", b"", b"\r\n", b"\n\n\x00\n"])
            done.append(f"line {number + 1}: {what}")
        return b"".join(lines), "; ".join(done)

    return mutate


TEMPLATES = (
    *("{{ 1 / 0 }}", "{{ messages[99].content }}", "{% for i in range(10**9) %}x{% endfor %}", "", "\ud83d", "{" * 5000),
    *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ 'a' * 10**6 }}", "{{ " + "(" * 5000, "{% if %}", "{% raise %}"),
    *("{{ raise_exception('no') }}", "{{ ''.__class__ }}", "{% for a in messages %}" * 200, "{{ messages | tojson }}"),
    *("{% include 'x' %}", "{{ messages[0]['content'] }}" * 50, "{{ [] | first }}", "{{ -'a' }}"),
)


def mutate_template(content: bytes, draws: random.Random) -> tuple[bytes, str]:
    """Change a chat template, or put another program in its place."""
    if draws.random() < 0.5:
        return mutate_bytes(content, draws)
    text = draws.choice(TEMPLATES)
    return text.encode("utf-8", "surrogatepass"), f"the template {text[:60]!r}"


def mutate_toml(content: bytes, draws: random.Random) -> tuple[bytes, str]:
    """Change a value or a line of a TOML file, or its bytes."""
    if draws.random() < 0.3:
        return mutate_bytes(content, draws)
    lines = content.decode().splitlines()
    at = draws.randrange(len(lines))
    values = [
        "0",
        "-1",
        "1",
        "3",
        "100000000",
        "9223372036854775808",
        "1e308",
        "nan",
        "inf",
        "-inf",
        "0.5",
        "true",
        '""',
        '"text"',
        "[]",
    ]
    values += [
        "{}",
        "[[1]]",
        "1979-05-27",
        '"(a+)+$"',
        '["(a+)+$"]',
        '["q_proj"]',
        "9" * 6000,
        "[" * 3000 + "]" * 3000,
        '"\\u0000"',
    ]
    match draws.choice(["value", "value", "value", "drop", "twice", "key"]):
        case "value":
            lines[at] = f"{lines[at].partition('=')[0]}= {draws.choice(values)}"
        case "drop":
            del lines[at]
        case "twice":
            lines.insert(at, lines[at])
        case "key":
            lines[at] = draws.choice(["[x]", "x = 1", "[[lora]]", "[lora.x]", '"" = 1', "lora = 1"])
    return "\n".join(lines).encode(), f"line {at + 1}: {lines[min(at, len(lines) - 1)][:60] if lines else ''}"
