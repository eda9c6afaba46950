"""Damages the bytes of a file, at random but the same for the same draws: what fuzz.py tries.

Of JSON, of the header of safetensors, of a pickle in an archive and of GGUF, the structure is damaged: values of other types,
sizes and signs, names that are missing or twice. Of each format the bytes are damaged as well: flipped, cut out, put in twice,
cut off. A mutation returns the new bytes and what was done, in words.
"""

import copy
import dataclasses
import io
import json
import random
import struct
import zipfile
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
            except ValueError:  # changed before
                continue
            lines[number] = json_text(value) + draws.choice([b"\n", b"\n", b"\n", b"", b"\r\n", b"\n\n\x00\n"])
            done.append(f"line {number + 1}: {what}")
        return b"".join(lines), "; ".join(done)

    return mutate


def mutate_safetensors(content: bytes, draws: random.Random) -> tuple[bytes, str]:
    """Change the header, its length, or the bytes of a file of safetensors."""
    end = 8 + int.from_bytes(content[:8], "little")
    part = draws.random()
    if part < 0.1:
        length = draws.choice([0, 1, 2**63, 2**32, 10**8, end, end + 1, len(content)])
        return struct.pack("<Q", length) + content[8:], f"length {length}"
    if part < 0.3:
        return mutate_bytes(content, draws, first=8, last=end)
    if part < 0.5:
        return mutate_bytes(content, draws, first=end)
    if part < 0.55:
        at = draws.randrange(end, len(content) - 4) // 4 * 4
        value = struct.pack("<f", draws.choice([float("nan"), float("inf"), 1e30, -0.0]))
        return content[:at] + value + content[at + 4 :], f"a value at {at}"
    header = json.loads(content[8:end])
    names = [name for name in header if name != "__metadata__"]
    if draws.random() < 0.25 and len(names) > 1:
        (one, other), field = draws.sample(names, 2), draws.choice(["data_offsets", "shape", "dtype"])
        header[one][field], header[other][field] = header[other][field], header[one][field]
        done = f"{field} of {one} and {other} swapped"
    elif draws.random() < 0.3:
        name = draws.choice(names)
        header[name]["shape"] = draws.choice(
            [[2**31, 2**31], [2**62], [1] * 40, [-1, -4], [0], [], [1, *header[name]["shape"]], [10**9, 0]]
        )
        done = f"shape of {name}: {header[name]['shape']}"
    else:
        header, done = mutate_value(
            header, draws, ("__metadata__", "dtype", "shape", "data_offsets", names[0], names[0] + ".x")
        )
    text = json_text(header)
    return struct.pack("<Q", len(text)) + text + content[end:], done


@dataclasses.dataclass
class Gguf:
    """A GGUF file: entries (key, type, value), where an array's value is (type of its elements, values), tensors (name, sizes, type, offset), data."""

    entries: list[tuple[str, int, Any]]
    tensors: list[tuple[str, list[int], int, int]]
    data: bytes

    CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    STRING, ARRAY = 8, 9

    def value(self, kind: int, value: Any) -> bytes:
        if kind == self.STRING:
            data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
            return struct.pack("<Q", len(data)) + data
        if kind == self.ARRAY:
            inner, values = value
            return struct.pack("<IQ", inner, len(values)) + b"".join(self.value(inner, one) for one in values)
        return struct.pack("<" + self.CODES[kind], value)

    def content(self) -> bytes:
        out = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.entries))
        for key, kind, value in self.entries:
            out += self.value(8, key) + struct.pack("<I", kind) + self.value(kind, value)
        for name, sizes, kind, offset in self.tensors:
            out += self.value(8, name) + struct.pack("<I", len(sizes))
            out += struct.pack(f"<{len(sizes)}QIQ", *sizes, kind, offset)
        return out + b"\0" * (-len(out) % 32) + self.data

    def mutated(self, draws: random.Random) -> tuple[bytes, str]:
        """Return the bytes of a file with one to three entries or tensors changed."""
        self, done = copy.deepcopy(self), []
        for _ in range(draws.choice([1, 1, 2, 3])):
            done.append(self._change_entry(draws) if draws.random() < 0.7 else self._change_tensor(draws))
        content = self.content()
        if draws.random() < 0.1:
            return mutate_bytes(content, draws, last=len(content) - len(self.data))
        return content, ", ".join(done)

    def _change_entry(self, draws: random.Random) -> str:
        at = draws.randrange(len(self.entries))
        key, kind, value = self.entries[at]
        match draws.choice(["drop", "twice", "value", "value", "value", "items", "rename"]):
            case "drop":
                del self.entries[at]
                return f"drop {key}"
            case "twice":
                self.entries.append(self.entries[at])
                return f"{key} twice"
            case "items" if kind == self.ARRAY:
                inner, values = value
                values = draws.choice([[], values[:1], values * 2, values[::-1], values[:-1], [values[0]] * len(values)])
                self.entries[at] = key, kind, (inner, values)
                return f"{key}: {len(values)} values"
            case "rename":
                other = draws.choice(
                    [key + ".x", key.replace("llama.", "llama.rope."), "", self.entries[0][0], "llama.expert_count"]
                )
                self.entries[at] = other, kind, value
                return f"{key} is {other!r}"
        kind, value = draws.choice(
            [
                *((4, number) for number in (0, 1, 3, 10**7, 2**31, 2**32 - 1)),
                *((5, -1), (10, 2**63), (11, -(2**63)), (0, 255), (7, True), (7, False)),
                *((kind, number) for kind in (6, 12) for number in (0.0, -1.0, float("nan"), float("inf"), 1e-30, 64.0)),
                *(
                    (8, text)
                    for text in (
                        "",
                        "llama",
                        "gemma3",
                        "phi3",
                        "gptneox",
                        "yarn",
                        "x" * 5000,
                        b"\xff\xfe",
                        "(a+)+$",
                        "{{ 1 / 0 }}",
                        "{% for a in b %}",
                    )
                ),
                *((9, (8, ["a", "b"])), (9, (4, [1, 2])), (9, (5, [])), (9, (9, [(4, [1])])), (9, (6, [float("nan")] * 8))),
            ]
        )
        self.entries[at] = key, kind, value
        return f"{key}: {str(value)[:40]}"

    def _change_tensor(self, draws: random.Random) -> str:
        at = draws.randrange(len(self.tensors))
        name, sizes, kind, offset = self.tensors[at]
        other = draws.choice(self.tensors)
        match draws.randrange(7):
            case 0:
                del self.tensors[at]
                return f"drop {name}"
            case 1:
                self.tensors[at] = other[0], sizes, kind, offset
                return f"{name} is {other[0]}"
            case 2:
                sizes = draws.choice(
                    [sizes[::-1], [*sizes, 1], [0], [], [2**40, 2**40], [2**63], [2**62, 4], [32] * 5, other[1], [1] * 9]
                )
            case 3:
                kind = draws.choice([0, 1, 2, 4, 5, 8, 12, 14, 16, 30, 39, 99, 2**32 - 1])
            case 4:
                offset = draws.choice([0, 1, 31, 2**63, 2**64 - 1, len(self.data), other[3], offset + 4])
            case 5:
                self.tensors.append((name + draws.choice(["", ".x", "s"]), sizes, kind, offset))
                return f"another {name}"
            case 6:
                self.data = self.data[: draws.randrange(len(self.data))]
        self.tensors[at] = name, sizes, kind, offset
        return f"{name}: sizes {sizes}, type {kind}, offset {offset}, {len(self.data)} bytes of data"


def archive(pickled: bytes, storages: dict[str, bytes]) -> bytes:
    """Return an archive as torch.save writes it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, data in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}.items():
            file.writestr(f"adapter/{name}", data)
        for key, data in storages.items():
            file.writestr(f"adapter/data/{key}", data)
    return out.getvalue()


def pickled_tensors(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """Return the pickle of float32 tensors by name, of which the storage of number n has the key n; in torch.save's instructions."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    out = b"\x80\x02}("
    for key, (name, shape) in enumerate(shapes.items()):
        strides = [1]
        for size in shape[:0:-1]:
            strides.insert(0, strides[0] * size)
        count = strides[0] * shape[0]
        out += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        out += text("storage") + b"ctorch\nFloatStorage\n" + text(str(key)) + text("cpu") + number(count) + b"tQ" + number(0)
        out += b"(" + b"".join(map(number, shape)) + b"t(" + b"".join(map(number, strides[: len(shape)])) + b"t"
        out += b"\x89ccollections\nOrderedDict\n)RtR"
    return out + b"u."


def mutate_archive(content: bytes, draws: random.Random) -> tuple[bytes, str]:
    """Change the pickle in an archive, one of its storages, or its bytes."""
    part = draws.random()
    if part < 0.2:
        return mutate_bytes(content, draws)
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    name = "adapter/data.pkl" if part < 0.8 else draws.choice(list(entries))
    if part < 0.5:  # a number: of a size, a stride, an offset
        at = draws.choice([at for at in range(len(entries[name])) if entries[name][at : at + 1] == b"J"])
        value = draws.choice([0, -1, 1, 3, 2**31 - 1, -(2**31), 10**6])
        entries[name], done = (
            entries[name][: at + 1] + struct.pack("<i", value) + entries[name][at + 5 :],
            f"{value} at {at}",
        )
    else:
        entries[name], done = mutate_bytes(entries[name], draws)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", draws.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])) as file:
        for entry, data in entries.items():
            file.writestr(entry, data)
    return out.getvalue(), f"{name}: {done}"


TEMPLATES = [
    "{{ 1 / 0 }}", "{{ messages[99].content }}", "{% for i in range(10**9) %}x{% endfor %}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 'a' * 10**6 }}", "{" * 5000, "{{ " + "(" * 5000, "{% if %}", "{% raise %}", "{{ raise_exception('no') }}", "", "\ud83d", "{{ ''.__class__ }}",
    "{% for a in messages %}" * 200, "{{ messages | tojson }}", "{% include 'x' %}", "{{ messages[0]['content'] }}" * 50, "{{ [] | first }}", "{{ -'a' }}",
]  # fmt: skip


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
