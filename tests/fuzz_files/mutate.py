"""What is done to a sound file's bytes. Every function takes a random.Random and gives other bytes."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from typing import Any

NUMBERS = (0, 1, -1, 2, 3, 255, 65536, 2**31 - 1, -(2**31), 2**31, 2**32, 2**40, 2**53 + 1, 2**63 - 1, 2**63, 2**64)


def damage(data: bytes, r: random.Random) -> bytes:
    """Bytes flipped, lost, added, moved, or replaced by numbers at the edges of their types."""
    kind = r.choice(
        ("flip", "flip", "cut", "grow", "zero", "copy", "insert", "delete", "number", "number", "twice", "none")
    )
    end = len(data) if r.random() < 0.6 else min(len(data), 1100)  # a header deserves more than its share
    if kind == "none" or not data:
        return b""
    at = r.randrange(end)
    size = min(r.choice((1, 2, 4, 8, 64, 1000)), len(data) - at)
    other = r.randrange(len(data))
    out = bytearray(data)
    if kind == "flip":
        for _ in range(r.choice((1, 1, 2, 8, 100))):
            out[r.randrange(end)] ^= 1 << r.randrange(8)
    elif kind == "cut":
        del out[at:]
    elif kind == "grow":
        out += bytes(size) if r.random() < 0.5 else r.randbytes(size)
    elif kind == "zero":
        out[at : at + size] = bytes(size)
    elif kind == "copy":
        out[at : at + size] = data[other : other + size]
    elif kind == "insert":
        out[at:at] = r.randbytes(size)
    elif kind == "delete":
        del out[at : at + size]
    elif kind == "twice":
        out += data
    else:
        at -= at % 4
        form = r.choice("iqfdH")
        value = r.choice((*NUMBERS, float("nan"), float("inf"), 1e300))
        try:
            new = struct.pack(f"<{form}", value if form in "fd" else int(value))
        except (struct.error, OverflowError, ValueError):
            new = b"\xff" * 8
        out[at : at + len(new)] = new
    return bytes(out)


def _odd(r: random.Random) -> Any:
    """A value that nobody expects. Text that json.dumps cannot make is put in by `_dumps`."""
    nested: Any = []
    for _ in range(r.choice((3, 40))):
        nested = [nested] if r.random() < 0.5 else {"a": nested}
    texts = ("", "x", "gpt2", "a\nb", "\ud800", "0" * 300, "@DEEP@", "@HUGE@", "@LONG@")
    others = (None, True, False, [], {}, [1], [None], {"a": 1}, 0.5, -0.5, 1e308, float("nan"), float("inf"), nested)
    return r.choice((*texts, *others, *NUMBERS))


def _dumps(value: Any) -> bytes:
    text = json.dumps(value)
    text = text.replace('"@DEEP@"', "[" * 100_000 + "]" * 100_000).replace('"@HUGE@"', "9" * 400)
    return text.replace('"@LONG@"', "9" * 5000).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    found = []
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += [(value, key), *_places(item)]
    return found


def change(value: Any, r: random.Random) -> Any:
    """A JSON value with one to three of its parts replaced, removed, renamed or exchanged. Changes it in place."""
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        places = _places(value)
        if not places or r.random() < 0.03:
            return _odd(r)
        holder, key = r.choice(places)
        kind = r.choice(("replace", "replace", "replace", "remove", "rename", "swap", "near"))
        if kind == "replace":
            holder[key] = _odd(r)
        elif kind == "remove":
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[r.choice((f"{key}x", "", "__proto__", key[:-1]))] = holder.pop(key)
        elif kind == "swap":
            other, name = r.choice(places)
            first, second = copy.deepcopy(holder[key]), copy.deepcopy(other[name])
            holder[key], other[name] = second, first
        elif isinstance(holder[key], int):
            holder[key] += r.choice((-1, 1, 2**32))
    return value


def damage_json(data: bytes, r: random.Random) -> bytes:
    """A JSON document: as bytes, by its structure, or in another encoding."""
    chance = r.random()
    if chance < 0.25:
        return damage(data, r)
    out = _dumps(change(json.loads(data), r))
    if chance > 0.97:
        return out.decode().encode(r.choice(("utf-16", "utf-8-sig", "utf-32")))
    return out


def damage_jsonl(data: bytes, r: random.Random) -> bytes:
    """JSON Lines: one line of it, or the lines among themselves."""
    lines = data.splitlines(keepends=True)
    at = r.randrange(len(lines))
    kind = r.choice(("bytes", "line", "line", "double", "join", "blank"))
    if kind == "bytes":
        return damage(data, r)
    if kind == "line":
        lines[at] = damage_json(lines[at], r) + b"\n"
    elif kind == "double":
        lines.insert(r.randrange(len(lines)), lines[at])
    elif kind == "join":
        lines[at] = lines[at].rstrip(b"\n")
    else:
        lines.insert(at, r.choice((b"\n", b"  \n", b"\r\n", b"\x00\n", b"\xff\xfe\n")))
    return b"".join(lines)


def damage_safetensors(data: bytes, r: random.Random) -> bytes:
    """A safetensors file: as bytes, or its header by its structure, with or without the length that fits it."""
    size = int.from_bytes(data[:8], "little")
    if r.random() < 0.3:
        return damage(data, r)
    header = json.loads(data[8 : 8 + size])
    if r.random() < 0.5:
        name = r.choice([name for name in header if name != "__metadata__"])
        entry, kind = header[name], r.choice(("dtype", "shape", "offsets", "other"))
        if kind == "dtype":
            entry["dtype"] = r.choice(("F64", "F16", "BF16", "I8", "U64", "BOOL", "F8_E4M3", "F4", "X", "f32", "I32"))
        elif kind == "shape":
            entry["shape"] = r.choice(
                (entry["shape"][::-1], [], [0], [2**32, 2**32], [*entry["shape"], 1], [-1], [1.5])
            )
        elif kind == "offsets":
            a, b = entry["data_offsets"]
            shift = r.choice((1, 4, -4, 2**33, 2**63))
            entry["data_offsets"] = r.choice(([b, a], [a + shift, b + shift], [a, a], [0, b], [a, b, b], [a]))
        else:
            header[name] = dict(header[r.choice([n for n in header if n != "__metadata__"])])
        new = json.dumps(header).encode()
    else:
        new = _dumps(change(header, r))
    length = len(new) if r.random() < 0.9 else r.choice((0, 1, len(new) - 1, len(new) + 1, 2**31, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + new + data[8 + size :]


def damage_zip(data: bytes, r: random.Random) -> bytes:
    """An archive of torch.save: as bytes, or its members, with checksums that fit."""
    if r.random() < 0.3:
        return damage(data, r)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    names = list(members)
    one, two = r.choice(names), r.choice(names)
    pickled = next(name for name in names if name.endswith("data.pkl"))
    kind = r.choice(("pickle", "pickle", "swap", "remove", "rename", "member", "add", "packed"))
    if kind == "pickle":
        members[pickled] = damage(members[pickled], r)
    elif kind == "swap":
        members[one], members[two] = members[two], members[one]
    elif kind == "remove":
        del members[one]
    elif kind == "rename":
        members[r.choice(("x", "../x", one + "x", ""))] = members.pop(one)
    elif kind == "member":
        members[one] = damage(members[one], r)
    elif kind == "add":
        members[r.choice(("archive/data/99", "x", one + "/y"))] = r.randbytes(40)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if kind == "packed" else zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name or "empty"), content, archive.compression)
    return out.getvalue()
