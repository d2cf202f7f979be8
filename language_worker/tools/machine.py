"""The tool machine of one sample: it watches the tokens, and says which must come next.

    ... <|python_start|> 1 2 + 3 0 <|python_end|>  <|output_start|> 4 2 <|output_end|> ...
        chosen by the model                         forced: nothing is chosen there

A function of the sample's own tokens and nothing else: other samples do not see it, and whoever goes on with a sample
elsewhere feeds it the tokens there are. Knows ids and the calculator, not logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

from language_worker.detokenizer import IncrementalDetokenizer
from language_worker.tokenizer import Tokenizer
from language_worker.tools.calculator import calculate

LITERALS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
MAX_EXPRESSION_TOKENS = 1000  # longer ones have no result


@dataclass(frozen=True, kw_only=True, slots=True)
class Toolbox:
    """The ids that open and close an expression and its result, and how both are spelled."""

    python_start: int
    python_end: int
    output_start: int
    output_end: int
    decode: Callable[[Sequence[int]], str]
    encode: Callable[[str], list[int]]

    def answer(self, expression: Sequence[int]) -> tuple[int, ...]:
        """The tokens that follow an expression; none when it has no result."""
        if not 0 < len(expression) <= MAX_EXPRESSION_TOKENS:
            return ()
        result = calculate(self.decode(expression))
        if result is None:
            return ()
        return (self.output_start, *self.encode(str(result)), self.output_end)


def find_toolbox(name: str | None, tokenizer: Tokenizer) -> Toolbox | None:
    """The toolbox that a model asks for by name, where its tokenizer has the tokens; None where it has not."""
    ids = [tokenizer.special_tokens.get(literal) for literal in LITERALS]
    if name != "calculator" or None in ids:
        return None
    start, end, output_start, output_end = (token_id for token_id in ids if token_id is not None)
    return Toolbox(
        python_start=start,
        python_end=end,
        output_start=output_start,
        output_end=output_end,
        decode=tokenizer.decode,
        encode=tokenizer.encode,
    )


class ToolMachine:
    """State of one sample. `forced`: ids that must come next."""

    __slots__ = ("_expression", "_toolbox", "forced")

    def __init__(self, toolbox: Toolbox) -> None:
        self._toolbox = toolbox
        self._expression: list[int] | None = None  # since the token that opened it
        self.forced: tuple[int, ...] = ()

    def observe(self, token_id: int) -> None:
        """The sample's next token is there."""
        if self.forced:
            self.forced = self.forced[1:]
        elif token_id == self._toolbox.python_start:
            self._expression = []
        elif token_id == self._toolbox.python_end and self._expression is not None:
            self.forced, self._expression = self._toolbox.answer(self._expression), None
        elif self._expression is not None and len(self._expression) <= MAX_EXPRESSION_TOKENS:
            self._expression.append(token_id)

    def copy(self) -> ToolMachine:
        """One that goes on from here by itself."""
        other = copy(self)
        other._expression = None if self._expression is None else list(self._expression)
        return other


class VisibleText:
    """A detokenizer that leaves out expressions and results: they are the model's notes, and the answer goes on with
    what it read there."""

    __slots__ = ("_detokenizer", "_ends", "_is_hidden", "_starts")

    def __init__(self, detokenizer: IncrementalDetokenizer, toolbox: Toolbox) -> None:
        self._detokenizer = detokenizer
        self._starts = frozenset({toolbox.python_start, toolbox.output_start})
        self._ends = frozenset({toolbox.python_end, toolbox.output_end})
        self._is_hidden = False

    def push(self, token_id: int) -> str:
        if token_id in self._starts or token_id in self._ends:
            self._is_hidden = token_id in self._starts
            return ""
        return "" if self._is_hidden else self._detokenizer.push(token_id)

    def flush(self) -> str:
        return self._detokenizer.flush()
