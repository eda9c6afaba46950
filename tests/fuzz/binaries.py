"""Damages safetensors, GGUF and PyTorch's archives: see mutations.py."""

import copy
import dataclasses
import io
import json
import random
import struct
import zipfile
from typing import Any

from mutations import json_text, mutate_bytes, mutate_value

CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # types of GGUF
STRING, ARRAY = 8, 9


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
    """A GGUF file.

    Attributes:
        entries: (key, type, value); the value of an array is (type of its elements, values).
        tensors: (name, sizes, type, offset).
        data: the bytes of the tensors.
    """

    entries: list[tuple[str, int, Any]]
    tensors: list[tuple[str, list[int], int, int]]
    data: bytes

    def value(self, kind: int, value: Any) -> bytes:
        if kind == STRING:
            data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
            return struct.pack("<Q", len(data)) + data
        if kind == ARRAY:
            inner, values = value
            return struct.pack("<IQ", inner, len(values)) + b"".join(self.value(inner, one) for one in values)
        return struct.pack("<" + CODES[kind], value)

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
            case "items" if kind == ARRAY:
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
    """Return torch.save's pickle of float32 tensors by name; the storage of the tensor of number n has the key n."""

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
