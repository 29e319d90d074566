"""A pickle of plain values, read without running it: numbers, strings, None, lists, tuples and dicts, and nothing else.

pickletools names the opcodes of the file one after the other; those below build values, any other one is refused. No
name in the file is ever looked up, so no code of it or of this system runs.
"""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import Any

MOST_BYTES = 16 << 20  # a table of characters has some kilobytes

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NEW = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_VALUES = (
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT",
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE",
)  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_plain_pickle(path: Path) -> Any:
    """The value in a file of `pickle.dump`. Raises ValueError, one line, for anything but plain values."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, far more than a table of characters")
    try:
        return _build(path.read_bytes())
    except _Refused as error:
        raise ValueError(f"{path} cannot be read safely: it holds {error}, more than plain values") from None
    except Exception as error:  # on bytes that are no pickle, anything may be wrong
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a whole pickle ({reason})") from None


class _Refused(Exception):
    pass


def _build(content: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []  # where in the stack
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = marks.pop()
        items = stack[at + 1 :]
        del stack[at:]
        return items

    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            (value,) = stack
            return value
        if name == "MARK":
            marks.append(len(stack))
            stack.append(_MARK)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _NEW:
            stack.append(_NEW[name]())
        elif name in _VALUES:
            stack.append(argument)
        elif name in _TUPLES:
            items = tuple(stack[-_TUPLES[name] :])
            stack[-_TUPLES[name] :] = [items]
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name == "LIST":
            stack.append(since_mark())
        elif name == "DICT":
            items = since_mark()
            stack.append(dict(zip(items[::2], items[1::2], strict=True)))
        elif name == "APPEND":
            value = stack.pop()
            list.append(stack[-1], value)
        elif name == "APPENDS":
            items = since_mark()
            list.extend(stack[-1], items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            dict.__setitem__(stack[-1], key, value)
        elif name == "SETITEMS":
            items = since_mark()
            dict.update(stack[-1], zip(items[::2], items[1::2], strict=True))
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            raise _Refused(f"{name} {argument}" if isinstance(argument, str) else name)
    raise ValueError("it has no end")
