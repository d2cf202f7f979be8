"""The calculator: values as published, Python's own arithmetic as the oracle, hostile expressions, threads."""

import ast
import operator
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from language_worker.tools.calculator import MAX_CHARS, MAX_DEPTH, calculate

PUBLISHED = [
    ("12,345+1", 12346), ("10/4", 2.5), ("7//2", 3), ("2**8", None), ("5%3", None), ("'strawberry'.count('r')", 3),
    ("'x'.upper()", None), ("'aaa'.count('a')*2", None),
]  # fmt: skip
OTHERS = [
    ("1", 1), (" 1 + 2 ", 3), ("2*(3+4)", 14), ("-7//2", -4), ("--3", 3), ("+-+2", -2), ("1.5*2", 3.0), (".5+1.", 1.5),
    ("00", 0), ("012", None), ("012.5", 12.5), ("1/0", None), ("1//0.0", None), ("", None), ("   ", None), ("()", None),
    ("(1)(2)", None), ("1 2", None), ("1.2.3", None), ("1+", None), ("*2", None), ("(1", None), ("1)", None),
    ("2 * * 3", None), ("7 / / 2", None), ("1e5", None), ("0x10", None), ("1_000", None), ("1\n+1", None),
    ("١+١", None),
    ('"hello".count("l")', 2), ("'a\"a'.count('a')", 2), ("'ab'.count(',')", 3), ("''.count('a')", 0),
    ("'aXa'.count( 'a' )", 2), ("'banana'.count('an')", 2), ("'a'.count('a').bit_length()", None),
    ("'a'.__class__.count('a')", None), ("'__import__'.count('i')", None), ("'eval'.count('e')", None),
    ("open('x').count('a')", None), ("'a'.count(a)", None), ("x.count('a')", None), ("'a'.count('a'", None),
    ("'é'.count('é')", None), ("print(1)", None),
]  # fmt: skip
HOSTILE = [
    "9**9**9", "9" * 5000 + "*9", "9" * 400, "*".join(["9" * 90] * 10), "(" * 400 + "1" + ")" * 400, "((((" * 200,
    "-" * 999 + "1", "1" + "+1" * 499, "'" + "a" * 990 + "'.count('a')", "'a'*9999999999", "'a'.count('a')" * 60,
    "'" * 900, "1/" * 400 + "1", "0." + "9" * 900, "9" * 305 + ".0*" + "9" * 305 + ".0", "\x00", "1" * 100_000_000,
    "__import__('os').system('true')", "lambda: 0", "(lambda:1).count(", "'a'.count('a' for a in 'a')",
]  # fmt: skip


@pytest.mark.parametrize(("expression", "value"), PUBLISHED + OTHERS)
def test_values(expression: str, value: Any) -> None:
    got = calculate(expression)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("expression", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_expressions_have_a_small_answer_or_none(expression: str) -> None:
    got = calculate(expression)
    assert got is None or len(str(got)) < 400


def test_hostile_expressions_take_few_steps() -> None:
    """What bounds the time: characters, nesting, and the size of every number on the way; counted, not timed."""
    assert calculate("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH) == 1
    assert calculate("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1)) is None
    assert calculate("1" + " " * (MAX_CHARS - 1)) == 1
    assert calculate("1" + " " * MAX_CHARS) is None
    assert calculate("9" * 301) == int("9" * 301) and calculate("9" * 302) is None
    assert calculate("9" * 151 + "*" + "9" * 151) is None and calculate("1-" + "9" * 302) is None


NUMBERS = st.integers(0, 10**6).map(str) | st.floats(0, 1e6, allow_nan=False).map(lambda x: f"{x:.3f}")
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", " + ", "* -"]), inner).map("".join),
        inner.map("({})".format),
        inner.map("-{}".format),
    ),
    max_leaves=12,
)
_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


def _by_python(node: ast.expr) -> Any:
    """Python's own reading of an expression; no value where Python has none."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_by_python(node.operand))
    assert isinstance(node, ast.BinOp)
    return _OPERATORS[type(node.op)](_by_python(node.left), _by_python(node.right))


@settings(deadline=None, max_examples=200)
@given(EXPRESSIONS)
def test_arithmetic_is_pythons(expression: str) -> None:
    try:
        expected = _by_python(ast.parse(expression.strip(), mode="eval").body)
    except (ZeroDivisionError, SyntaxError):
        expected = None
    got = calculate(expression)
    assert got == expected and str(got) == str(expected)


@settings(deadline=None, max_examples=300)
@given(st.text("0123456789*+-/.() ,'\"abrcount_%", max_size=40))
def test_any_text_has_an_answer(expression: str) -> None:
    got = calculate(expression)
    assert got is None or type(got) in (int, float)


def test_it_works_in_any_thread() -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(calculate("'thread'.count('t')")), daemon=True)
    thread.start()
    thread.join()
    assert found == [1]
