"""Reading a pickled `tiktoken.Encoding` as data: nothing is imported, constructed or called.

nanochat keeps its tokenizer so, and a pickle is a program. Here its opcodes are only looked at: constants, tuples and
dicts are built, a class is a name, and the one object there may be is what `tiktoken.Encoding` is pickled as, whose
state is returned. Every other opcode is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_BYTES = 64 << 20
ENCODINGS = frozenset({("tiktoken.core", "Encoding"), ("tiktoken", "Encoding")})
_CONSTANTS = {0x4E: None, 0x88: True, 0x89: False}  # N and the two truth values
_NUMBERS = {0x4B: 1, 0x4D: 2, 0x4A: 4}  # K, M, J: bytes of the number, which is signed in J alone
_TEXTS = {0x8C: 1, 0x58: 4, 0x8D: 8}  # bytes of the length in front of a string
_BYTES = {0x43: 1, 0x42: 4, 0x8E: 8}  # and of a byte string
_LONG, _PROTO, _FRAME, _DICT, _TUPLE, _MARK, _ITEM, _ITEMS = 0x8A, 0x80, 0x95, 0x7D, 0x29, 0x28, 0x73, 0x75
_MEMOIZE, _STACK_GLOBAL, _GLOBAL, _NEWOBJ, _BUILD, _STOP = 0x94, 0x93, 0x63, 0x81, 0x62, 0x2E
_PUT = {0x71: 1, 0x72: 4}  # bytes of the memo's index
_GET = {0x68: 1, 0x6A: 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class TiktokenEncoding:
    """What an encoding is made of: the pattern that splits text, the rank of every token, the special tokens' ids."""

    pattern: str
    ranks: Mapping[bytes, int]
    special_tokens: Mapping[str, int]


def read_tiktoken_pickle(data: bytes) -> TiktokenEncoding:
    """Raises ValueError saying what the file holds instead."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes; at most {MAX_BYTES} are read")
    try:
        state = _Reader(data).read()
    except (IndexError, TypeError, KeyError) as error:
        raise ValueError(f"its opcodes do not fit each other ({type(error).__name__})") from error
    return _checked(state)


class _Class:
    """A class that was named; `is_made`: an object of it was begun."""

    __slots__ = ("is_made", "path")

    def __init__(self, path: tuple[str, str], is_made: bool = False) -> None:
        self.path = path
        self.is_made = is_made


class _Reader:
    """The machine of one pickle: its bytes, a stack, marks on it, and a memo."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def read(self) -> Any:
        """The state of the object that the pickle ends with."""
        while (opcode := self._take(1)[0]) != _STOP:
            if not (self._did_constant(opcode) or self._did_memo(opcode) or self._did_dict(opcode)):
                self._do_class(opcode)
        return self._stack[-1]

    def _take(self, count: int) -> bytes:
        self._at += count
        if self._at > len(self._data):
            raise ValueError("it ends too early")
        return self._data[self._at - count : self._at]

    def _number(self, num_bytes: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._take(num_bytes), "little", signed=signed)

    def _line(self) -> str:
        end = self._data.index(b"\n", self._at)
        line = self._take(end - self._at)
        self._take(1)
        return line.decode()

    def _did_constant(self, opcode: int) -> bool:
        if opcode in _CONSTANTS:
            value: Any = _CONSTANTS[opcode]
        elif opcode in _NUMBERS:
            value = self._number(_NUMBERS[opcode], signed=_NUMBERS[opcode] == 4)
        elif opcode == _LONG:
            value = self._number(self._number(1), signed=True)
        elif opcode in _TEXTS:
            value = self._take(self._number(_TEXTS[opcode])).decode("utf-8")
        elif opcode in _BYTES:
            value = self._take(self._number(_BYTES[opcode]))
        elif opcode == _TUPLE:  # the empty one, as the arguments of an object; others are not needed
            value = ()
        else:
            return False
        self._stack.append(value)
        return True

    def _did_memo(self, opcode: int) -> bool:
        if opcode == _MEMOIZE:
            self._memo[len(self._memo)] = self._stack[-1]
        elif opcode in _PUT:
            self._memo[self._number(_PUT[opcode])] = self._stack[-1]
        elif opcode in _GET:
            self._stack.append(self._memo[self._number(_GET[opcode])])
        elif opcode in (_PROTO, _FRAME):
            self._take(1 if opcode == _PROTO else 8)
        else:
            return False
        return True

    def _did_dict(self, opcode: int) -> bool:
        stack = self._stack
        if opcode == _DICT:
            stack.append({})
        elif opcode == _MARK:
            self._marks.append(len(stack))
        elif opcode in (_ITEM, _ITEMS):
            start = self._marks.pop() if opcode == _ITEMS else len(stack) - 2
            items, stack[start:] = stack[start:], []
            if not isinstance(stack[-1], dict):
                raise ValueError("it sets items of something that is no dict")
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        else:
            return False
        return True

    def _do_class(self, opcode: int) -> None:
        """Opcodes that would run something: none of them does, and only the encoding's own are understood."""
        stack = self._stack
        if opcode in (_GLOBAL, _STACK_GLOBAL):
            path = (self._line(), self._line()) if opcode == _GLOBAL else (stack[-2], stack[-1])
            if opcode == _STACK_GLOBAL:
                del stack[-2:]
            if path not in ENCODINGS:
                shown = ".".join(part[:80] for part in path if isinstance(part, str))
                raise ValueError(f"it names {shown}; only a tiktoken.Encoding is read")
            stack.append(_Class(path))
        elif opcode == _NEWOBJ and stack[-1] == () and isinstance(stack[-2], _Class):
            stack[-2:] = [_Class(stack[-2].path, is_made=True)]
        elif opcode == _BUILD and isinstance(stack[-2], _Class) and stack[-2].is_made:
            stack[-2:] = [stack[-1]]
        else:
            raise ValueError(f"it holds the opcode {bytes([opcode])!r}; only a tiktoken.Encoding is read")


def _checked(state: Any) -> TiktokenEncoding:
    if isinstance(state, str):
        raise ValueError(f"it only names the registered encoding {state[:80]!r}, and does not hold it")
    if not isinstance(state, dict):
        raise ValueError("it does not end with the state of a tiktoken.Encoding")
    pattern, ranks, special = (state.get(name) for name in ("pat_str", "mergeable_ranks", "special_tokens"))
    if not isinstance(pattern, str) or not _maps(ranks, bytes) or not _maps(special, str):
        raise ValueError("its pat_str, mergeable_ranks or special_tokens is missing, or not what it should be")
    return TiktokenEncoding(pattern=pattern, ranks=ranks, special_tokens=special)  # type: ignore[arg-type]


def _maps(value: Any, key: type) -> bool:
    """A map from these keys to distinct token ids."""
    if not isinstance(value, dict) or not all(type(k) is key and type(v) is int and v >= 0 for k, v in value.items()):
        return False
    return len(set(value.values())) == len(value)
