"""Request bodies: bytes off the wire within caps, then strict JSON, then a schema.

The caps hold while the body arrives, not after. JSON is UTF-8, with finite numbers, bounded nesting and no lone
surrogates: what passes here can be encoded again anywhere further on. Knows nothing of what the fields mean.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any, NoReturn, TypeVar

import pydantic
from starlette.requests import Request

from cluster.errors import BadRequest, BodyTimeout, BodyTooLarge, Overloaded, UnsupportedMediaType, UnsupportedParameter

BODY_IDLE_TIMEOUT_S = 30.0
MAX_NESTING = 64
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")

Schema = TypeVar("Schema", bound=pydantic.BaseModel)


class BodyBudget:
    """Bytes of request bodies that all requests together may hold."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0

    @property
    def used(self) -> int:
        return self._used

    def take(self, num_bytes: int) -> None:
        """Raises Overloaded if the bytes do not fit now."""
        if self._used + num_bytes > self._limit:
            raise Overloaded("the bodies of the running requests fill the server's memory budget")
        self._used += num_bytes

    def give(self, num_bytes: int) -> None:
        self._used -= num_bytes


class Loan:
    """What one request has taken from the budget; `close` gives all of it back."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._taken = 0

    def take(self, num_bytes: int) -> None:
        """Raises Overloaded if the bytes do not fit now."""
        self._budget.take(num_bytes)
        self._taken += num_bytes

    def close(self) -> None:
        self._budget.give(self._taken)
        self._taken = 0


async def read_body(request: Request, *, max_bytes: int, budget: BodyBudget) -> bytes:
    """The whole body. On return the caller owes `budget` its length; on an error nothing is owed.

    Raises BodyTooLarge, UnsupportedMediaType, BodyTimeout, Overloaded; ClientDisconnect if the client left.
    """
    _check_headers(request, max_bytes)
    stream = request.stream().__aiter__()
    parts: list[bytes] = []
    total = 0
    try:
        while True:
            async with asyncio.timeout(BODY_IDLE_TIMEOUT_S):
                part = await anext(stream, None)
            if part is None:
                return b"".join(parts)
            if total + len(part) > max_bytes:
                raise BodyTooLarge(f"the request body exceeds {max_bytes} bytes; send smaller or fewer images")
            budget.take(len(part))
            total += len(part)
            parts.append(part)
    except BaseException as error:
        budget.give(total)
        if isinstance(error, TimeoutError):
            raise BodyTimeout(f"no more of the request body arrived for {BODY_IDLE_TIMEOUT_S:g} s") from None
        raise


def _check_headers(request: Request, max_bytes: int) -> None:
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > max_bytes):
        raise BodyTooLarge(f"the request body has {declared[:18]} bytes; at most {max_bytes} are allowed")
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMediaType(f"content-type is {kind[:100]!r}; send application/json")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaType(f"content-encoding is {encoding[:100]!r}; send the body uncompressed")


def parse_json(body: bytes) -> dict[str, Any]:
    """Strict JSON object; raises BadRequest saying what is wrong where."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not valid UTF-8 (byte {error.start}); send JSON in UTF-8") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
    except RecursionError:
        raise BadRequest("the JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise BadRequest(
            f"the body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except ValueError:  # an integer of thousands of digits
        raise BadRequest("the body holds a number that is too long") from None
    if not isinstance(value, dict):
        raise BadRequest(f"the body must be a JSON object, not {_json_name(value)}")
    _check_nesting(value, check_text=_SURROGATE_ESCAPE.search(body) is not None)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise BadRequest(f"the body holds {name}, which is not JSON; use finite numbers")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadRequest(f"the number {text[:40]} is too large")
    return value


def _check_nesting(value: Any, *, check_text: bool) -> None:
    level = [value]
    for _ in range(MAX_NESTING):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
                if check_text:
                    below.extend(item)
            elif isinstance(item, list):
                below.extend(item)
            elif check_text and isinstance(item, str) and not _is_encodable(item):
                raise BadRequest("the body holds half of a UTF-16 surrogate pair; send whole characters")
        level = below
        if not level:
            return
    raise BadRequest(f"the JSON is nested more than {MAX_NESTING} levels deep")


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _json_name(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def validate(schema: type[Schema], fields: dict[str, Any]) -> Schema:
    """The fields as a schema; raises BadRequest or UnsupportedParameter for the first thing that is wrong."""
    try:
        return schema.model_validate(fields)
    except pydantic.ValidationError as error:
        first = _most_telling(error)
    except RecursionError:
        raise BadRequest("the JSON is nested too deeply") from None
    path = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        raise UnsupportedParameter(f"unknown parameter: {path!r}; remove it or check its spelling", path)
    if first["type"] == "missing":
        raise BadRequest(f"missing required parameter: {path!r}", path)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UnsupportedParameter):
        raise cause
    text = str(cause) if cause is not None else first["msg"]
    raise BadRequest(f"{path}: {text}" if path else text, path or None)


def _most_telling(error: pydantic.ValidationError) -> Any:
    """Of the first wrong field's errors the deepest: of a union's branches, the one that fits best."""
    errors = error.errors(include_url=False, include_input=False)
    field = errors[0]["loc"][:1]
    return max((e for e in errors if e["loc"][:1] == field), key=lambda e: len(e["loc"]))


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content[1].text` of pydantic's location, without the names of union branches: `str`, `list[...]`,
    and the tag that follows an index into the latter."""
    path, previous = "", ("", "")
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not path:
            path = step[:100]
        elif step.isidentifier() and step != "str" and not previous[0].startswith("list["):
            path += f".{step}"
        previous = (previous[1], str(step))
    return path
