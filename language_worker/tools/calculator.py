"""The calculator that nanochat models are trained with: `+ - * / //` over numbers, and `'text'.count('part')`.

A grammar of its own, with Python's numbers and Python's precedence; nothing is evaluated as a program. What does not
fit the grammar has no result, nor has what would grow large: expressions, numbers and nesting are bounded, so that any
answer is there within a fraction of a millisecond, in any thread.

    sum      product (("+" | "-") product)*
    product  sign (("*" | "/" | "//") sign)*
    sign     ("+" | "-")* (number | "(" sum ")")
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from functools import lru_cache

MAX_CHARS = 1000
MAX_BITS = 1000  # of a whole number, on the way too
MAX_DEPTH = 50  # parentheses in each other

Number = int | float

# What the calculator of the training runs refused in a text, by these parts of words; models know its answers.
REFUSED_PARTS = (
    "__", "import", "exec", "eval", "compile", "open", "file", "input", "globals", "locals", "vars", "dir", "getattr",
    "setattr", "delattr", "hasattr",
)  # fmt: skip
_ARITHMETIC = re.compile(r"[0-9*+\-/.() ]+")
_TOKEN = re.compile(r" *(?:(\d+\.\d*|\.\d+|\d+)|(//|[-+*/()]))")
_TEXT = re.compile(r"[A-Za-z0-9'\"()._ ]+")
_LITERAL = r"(?:'([^']*)'|\"([^\"]*)\")"
_COUNT = re.compile(rf" *{_LITERAL}\.count\( *{_LITERAL} *\) *")
_SUMS: dict[str, Callable[[Number, Number], Number]] = {"+": operator.add, "-": operator.sub}
_PRODUCTS: dict[str, Callable[[Number, Number], Number]] = {
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
}


def calculate(expression: str) -> Number | None:
    """The value of an expression; None when it has none, or none that may be computed. Commas are left out first."""
    return None if len(expression) > MAX_CHARS else _calculate(expression.replace(",", ""))


@lru_cache(maxsize=256)  # who looks ahead in an output asks twice
def _calculate(text: str) -> Number | None:
    if _ARITHMETIC.fullmatch(text):
        return _value(text)
    return _count(text)


def _value(text: str) -> Number | None:
    tokens = _tokens(text)
    if not tokens:
        return None
    try:
        parser = _Parser(tokens)
        value = parser.sum(MAX_DEPTH)
    except (_NoValueError, ArithmeticError):
        return None
    return value if parser.is_at_end else None


def _count(text: str) -> int | None:
    if not _TEXT.fullmatch(text) or any(part in text.lower() for part in REFUSED_PARTS):
        return None
    match = _COUNT.fullmatch(text)
    if match is None:
        return None
    whole, part = (match[1] or match[2] or ""), (match[3] or match[4] or "")
    return whole.count(part)


def _tokens(text: str) -> list[str] | None:
    """Numbers and signs; None when something is neither."""
    tokens, position, end = [], 0, len(text.rstrip(" "))
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        tokens.append(match[1] or match[2])
        position = match.end()
    return tokens


class _NoValueError(Exception):
    """The tokens are no expression, or its value may not be computed."""


class _Parser:
    """Reads tokens from left to right and computes on the way."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._next = 0

    @property
    def is_at_end(self) -> bool:
        return self._next == len(self._tokens)

    def sum(self, depth: int) -> Number:
        return self._chain(_SUMS, lambda: self._chain(_PRODUCTS, lambda: self._sign(depth)))

    def _chain(self, operations: dict[str, Callable[[Number, Number], Number]], part: Callable[[], Number]) -> Number:
        value = part()
        while (operation := operations.get(self._peek())) is not None:
            self._next += 1
            value = _bounded(operation(value, part()))
        return value

    def _sign(self, depth: int) -> Number:
        is_negative = False
        while self._peek() in ("+", "-"):
            is_negative ^= self._take() == "-"
        value = self._atom(depth)
        return -value if is_negative else value

    def _atom(self, depth: int) -> Number:
        token = self._take()
        if token == "(" and depth:
            value = self.sum(depth - 1)
            if self._take() == ")":
                return value
        elif token[:1].isdigit() or token[:1] == ".":
            return _number(token)
        raise _NoValueError

    def _peek(self) -> str:
        return "" if self.is_at_end else self._tokens[self._next]

    def _take(self) -> str:
        token = self._peek()
        self._next += 1
        return token


def _number(token: str) -> Number:
    if "." in token:
        return _bounded(float(token))
    if token[0] == "0" and token.strip("0"):
        raise _NoValueError  # Python reads no whole number with zeros in front
    return _bounded(int(token))


def _bounded(value: Number) -> Number:
    if math.isfinite(value) if isinstance(value, float) else value.bit_length() <= MAX_BITS:
        return value
    raise _NoValueError
