"""How an input is taken apart to be changed, and put together again so that it gets past the first check.

A safetensors file with a changed header gets its length right again, a zip archive its checksums. One input
of three is changed as bytes.
"""

import contextlib
import gzip
import io
import json
import re
import struct
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import onnx
import tomli_w
from fuzz.trees import RAW, SCALARS, mutated_tree, with_raw

Form = Callable[[bytes, Random], bytes]
"""Returns a changed input; raises something where the input has not this form."""
ODD_TEXTS = [*RAW, *(scalar for scalar in SCALARS if isinstance(scalar, str)), *"@:/?#[]=.\0-%;'\"{}"]
_ODD_NUMBERS = [0, 1, -1, 2, 7, 8, 16, 22, 255, 2**16, 2**31 - 1, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63)]
_NUMBERS = [
    n & 0xFFFFFFFF for n in (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
]


def mutate(data: bytes, form: Form | None, random: Random, change_bytes: Callable[[bytes], bytes]) -> bytes:
    """Returns a changed input: by its form two times of three, as bytes where it has none."""
    if form is not None and random.random() < 2 / 3:
        with contextlib.suppress(Exception):  # it has not that form any more
            return form(data, random)
    return change_bytes(data)


def changed_bytes(data: bytes, random: Random) -> bytes:
    """Returns data with some bytes changed, added or cut; what libFuzzer does, where it is not there."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randint(0, len(changed))
        kind = random.randrange(5)
        if kind == 0:
            changed[at : at + 1] = bytes([random.randrange(256)])
        elif kind == 1:
            del changed[at : at + random.choice((1, 4, 64))]
        elif kind == 2:
            changed[at : at + 4] = struct.pack(random.choice("<>") + "I", random.choice(_NUMBERS))
        elif kind == 3:
            changed[at:at] = changed[: random.randint(0, 64)]
        else:
            del changed[at:]
    return bytes(changed)


def json_form(data: bytes, random: Random) -> bytes:
    """A JSON document."""
    tree = mutated_tree(json.loads(data), random)
    text = with_raw(json.dumps(tree, ensure_ascii=random.random() < 0.5))
    return text.encode(errors="surrogatepass")


def toml_form(data: bytes, random: Random) -> bytes:
    """A TOML document."""
    tree = _without_none(mutated_tree(tomllib.loads(data.decode()), random))
    return with_raw(tomli_w.dumps(tree)).encode(errors="surrogatepass")


def lines_form(data: bytes, random: Random) -> bytes:
    """A JSON document a line."""
    lines = data.splitlines() or [b""]
    at = random.randrange(len(lines))
    lines[at] = json_form(lines[at], random)
    return b"\n".join(lines)


def text_form(data: bytes, random: Random) -> bytes:
    """Words with a meaning: odd ones are put between them."""
    odd = random.choice(ODD_TEXTS).encode(errors="surrogatepass")
    at = random.choice([0, *(match.end() for match in re.finditer(rb"\W|$", data))])
    return data[:at] + odd + data[at + random.choice((0, 0, 1, 8)) :]


def safetensors_form(data: bytes, random: Random) -> bytes:
    """A safetensors file, whose header may have documents in its metadata."""
    (length,) = struct.unpack("<Q", data[:8])
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.get("__metadata__", {})
    inner = [key for key, value in metadata.items() if value.startswith("{")]
    if inner and random.random() < 0.5:
        key = random.choice(inner)
        metadata[key] = json_form(metadata[key].encode(), random).decode()
        text = json.dumps(header)
    else:
        text = with_raw(json.dumps(mutated_tree(header, random)))
    encoded = text.encode(errors="surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + tensors


def npz_form(data: bytes, random: Random) -> bytes:
    """A numpy archive: one of its arrays is changed, in its header or behind it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = random.choice(list(members))
    array = members[name]
    (length,) = struct.unpack("<H", array[8:10])
    header = array[10 : 10 + length]
    if random.random() < 0.7:
        old, new = random.choice(_NPY_CHANGES)
        header = header.replace(old, new) if random.random() < 0.7 else changed_bytes(header, random)
        members[name] = array[:8] + struct.pack("<H", len(header) & 0xFFFF) + header + array[10 + length :]
    else:
        members[name] = changed_bytes(array, random)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()


def onnx_form(data: bytes, random: Random) -> bytes:
    """An ONNX file: a message in it has a field more, less or changed, and all lengths are right."""
    model = onnx.load_model_from_string(data)
    message = random.choice([model, *_messages(model)])
    fields = message.DESCRIPTOR.fields
    field = random.choice(fields)
    if random.random() < 0.2:
        message.ClearField(field.name)
    elif field.type == field.TYPE_MESSAGE:
        others = [other for other in _messages(model) if other.DESCRIPTOR is field.message_type]
        content = (
            random.choice(others).SerializeToString() if others else b""
        )  # first: it may be around the place
        target = getattr(message, field.name)
        made = target.add() if field.is_repeated else target
        made.MergeFromString(content)
        made.SetInParent()
    else:
        is_text = field.type in (field.TYPE_STRING, field.TYPE_BYTES)
        value = random.choice(ODD_TEXTS[:40] if is_text else _ODD_NUMBERS)
        value = value.encode(errors="replace") if field.type == field.TYPE_BYTES else value
        value = float(value) if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE) else value
        if field.is_repeated:
            values = getattr(message, field.name)
            del values[random.randint(0, len(values)) :]
            values.extend([value] * random.choice((1, 1, 3)))
        else:
            setattr(message, field.name, value)
    return model.SerializeToString()


def _messages(message: Any) -> Iterator[Any]:
    """Yields all messages inside another one."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in value if field.is_repeated else (value,):
                yield inner
                yield from _messages(inner)


def gzip_form(data: bytes, random: Random) -> bytes:
    """What gzip packed."""
    return gzip.compress(changed_bytes(gzip.decompress(data), random), 1)


_NPY_CHANGES = [
    (b"|u1", b"|O"), (b"|u1", b"<f4"), (b"|u1", b"<M8[s]"), (b"|u1", b"|V0"), (b"|u1", b"|S0"),
    (b"<i8", b"<U1"), (b"<i8", b">i2"), (b"(3,", b"(-1,"), (b"(3,", b"(99999999999999999999,"),
    (b"(3,", b"(4294967296, 4294967296,"), (b"(3,", b"(0,"), (b"(3,", b"(3, 0,"), (b"(3,", b"(" * 900),
    (b"False", b"True"), (b"'", b'"'), (b"(3,", b"(1e9,"), (b"descr", b"Descr"), (b"{", b"{'a': 1, "),
    (b"|u1'", b"|u1', 'descr': [('a', '<i4')]"),
]  # fmt: skip


def _without_none(tree: Any) -> Any:
    """Returns a document as TOML can have it."""
    if isinstance(tree, dict):
        return {str(key): _without_none(value) for key, value in tree.items() if value is not None}
    return [_without_none(value) for value in tree if value is not None] if isinstance(tree, list) else tree
