"""A jinja2 environment for chat templates that come with checkpoints.

The same dialect that the published templates are written for (trim_blocks, lstrip_blocks, loop controls,
`raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, the `generation` tag), inside the immutable
sandbox. A template is trusted to phrase a prompt, not to behave: loop iterations, the results of `*`, `**` and `%`, and
the size of the rendering are bounded. Knows nothing of messages, tokens or requests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_LOOP_ITERATIONS = 1_000_000
MAX_OPERATION_RESULT = 1_000_000  # characters of a `*` or `%` result, value of a `**` exponent

_TICK = "_tandem_tick"


class TemplateLimit(jinja2.exceptions.TemplateRuntimeError):
    """The template looped or wrote more than a prompt can need."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks an assistant's words for training; here it only shows its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox plus bounds: each pass of a loop calls a counter, and growing operators are checked."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in template.find_all(jinja2.nodes.For):
            tick = jinja2.nodes.Call(jinja2.nodes.Name(_TICK, "load"), [], [], None, None)
            loop.body.insert(0, jinja2.nodes.Output([tick]).set_lineno(loop.lineno))
        return template

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            size, times = (left, right) if hasattr(left, "__len__") else (right, left)
            if hasattr(size, "__len__") and isinstance(times, int) and len(size) * times > MAX_OPERATION_RESULT:
                raise TemplateLimit("the template repeats a value beyond the allowed size")
        elif operator == "**" and isinstance(right, (int, float)) and abs(right) > 64:
            raise TemplateLimit("the template raises a number to too high a power")
        elif operator == "%" and isinstance(left, str) and any(c.isdigit() or c == "*" for c in left):
            raise TemplateLimit("the template formats with an explicit width")
        return super().call_binop(context, operator, left, right)


def create_environment() -> BoundedEnvironment:
    """The environment that chat templates are compiled in."""
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def render_bounded(template: jinja2.Template, variables: Mapping[str, Any], max_chars: int) -> str:
    """Render; raises TemplateLimit when the text passes `max_chars` or the loops pass their bound."""
    remaining = MAX_LOOP_ITERATIONS

    def tick() -> str:
        nonlocal remaining
        remaining -= 1
        if remaining < 0:
            raise TemplateLimit("the template loops too often")
        return ""

    return "".join(_bounded(template.generate({**variables, _TICK: tick}), max_chars))


def _bounded(parts: Iterator[str], max_chars: int) -> Iterator[str]:
    total = 0
    for part in parts:
        total += len(part)
        if total > max_chars:
            raise TemplateLimit(f"the rendered prompt is longer than {max_chars} characters")
        yield part


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> str:
    raise jinja2.exceptions.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
