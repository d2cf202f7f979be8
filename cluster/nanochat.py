"""nanochat's own interface over `LLM`: token columns with masks, batches, conversations as training tokens.

    engine = NanoChatEngine(llm)
    for tokens, masks in engine.generate(engine.render_for_completion(conversation), num_samples=4, top_k=50):
        ...  # one token of every row, and whether the model chose it (1) or the tool machine wrote it (0)

The prompt is computed once for all rows, and every row draws for itself from its first token on. Row i depends on the
seed and on i alone: neither on how many rows there are nor on what others write.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.errors import BadRequest, ChatTemplateError
from cluster.llm import LLM
from language_worker.sampling_params import SamplingParams

Column = tuple[list[int], list[int]]
Conversation = Mapping[str, Any] | Sequence[Mapping[str, Any]]
SPECIALS = (
    "bos", "user_start", "user_end", "assistant_start", "assistant_end", "python_start", "python_end", "output_start",
    "output_end",
)  # fmt: skip
PARTS = {"text": ("", "", 1), "python": ("python_start", "python_end", 1)}
PARTS["python_output"] = ("output_start", "output_end", 0)


class NanoChatEngine:
    """Over an `LLM` whose tokenizer has nanochat's special tokens; BadRequest otherwise. Closing it is the LLM's."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        special = llm.tokenizer.special_tokens
        missing = [name for name in SPECIALS if f"<|{name}|>" not in special]
        if missing:
            raise BadRequest(
                f"the model's tokenizer has no <|{missing[0]}|>; NanoChatEngine is for nanochat models", "model"
            )
        self._ids = {name: special[f"<|{name}|>"] for name in SPECIALS}
        self._terminal = {self._ids["assistant_end"], self._ids["bos"]}

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> Iterator[Column]:
        """Columns (token of every row, mask of every row) as they come, until every row has ended or has `max_tokens`.

        A row ends with <|assistant_end|> or <|bos|>, which its column shows; later columns repeat it with mask 0.
        max_tokens None: up to the model's length. Raises InvalidRequest for values that make no sense.
        """
        if max_tokens == 0:
            return
        params = SamplingParams(
            n=num_samples,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k or 0,
            seed=seed,
            stop_token_ids=tuple(self._terminal),
        )
        rows = [_Row() for _ in range(num_samples)]
        for chunk in self._llm.stream(list(tokens), params):
            row = rows[chunk.index]
            row.items.extend(zip(chunk.token_ids, chunk.mask or (1,) * len(chunk.token_ids), strict=True))
            row.is_done = chunk.finish_reason is not None
            while any(row.items for row in rows) and all(row.items or row.is_done for row in rows):
                column = [row.take() for row in rows]
                yield [token for token, _ in column], [mask for _, mask in column]

    def generate_batch(
        self, tokens: Sequence[int], num_samples: int = 1, **options: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        """(rows, masks): the prompt and what follows it, without the token that ended a row; masks are as long, the
        prompt's are 0. options: as of `generate`."""
        rows = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        has_ended = [False] * num_samples
        for column, column_masks in self.generate(tokens, num_samples, **options):
            for i, (token, mask) in enumerate(zip(column, column_masks, strict=True)):
                has_ended[i] = has_ended[i] or token in self._terminal
                if not has_ended[i]:
                    rows[i].append(token)
                    masks[i].append(mask)
        return rows, masks

    def render_conversation(self, conversation: Conversation, max_tokens: int = 2048) -> tuple[list[int], list[int]]:
        """(ids, mask) of a whole conversation, cut to `max_tokens`; mask 1 where an assistant is to be trained: its
        text, its expressions and its end, not the results that tools wrote.

        conversation: a list of messages, or a map with `messages`. An assistant's content is a string, or a list of
        parts {"type": "text" | "python" | "python_output", "text": ...}. Raises ChatTemplateError.
        """
        ids, mask = [self._ids["bos"]], [0]
        for message in _turns(conversation):
            role = message["role"]
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            self._add(ids, mask, [self._ids[f"{role}_start"]], 0)
            for part in parts:
                before, after, trained = self._part(role, part)
                self._add(ids, mask, [*before, *self._llm.tokenizer.encode(part["text"]), *after], trained)
            self._add(ids, mask, [self._ids[f"{role}_end"]], int(role == "assistant"))
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: Conversation) -> list[int]:
        """Ids of a conversation up to the beginning of the answer; an answer that is there already is left out."""
        messages = list(_messages(conversation))
        if messages and messages[-1].get("role") == "assistant":
            messages.pop()
        ids, _ = self.render_conversation(messages, max_tokens=1 << 62)
        return [*ids, self._ids["assistant_start"]]

    def _part(self, role: str, part: Any) -> tuple[list[int], list[int], int]:
        """(ids before, ids after, mask) of one part of a message."""
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in PARTS or (role == "user" and kind != "text") or not isinstance(part.get("text"), str):
            raise ChatTemplateError(
                "a part of a message is {type: text, text: ...}; an assistant's may also be python or python_output",
                "messages",
            )
        start, end, trained = PARTS[kind]
        return [self._ids[start]] if start else [], [self._ids[end]] if end else [], trained * (role == "assistant")

    @staticmethod
    def _add(ids: list[int], mask: list[int], more: list[int], trained: int) -> None:
        ids += more
        mask += [trained] * len(more)


class _Row:
    """Tokens of one row that have come and are not in a column yet."""

    __slots__ = ("_last", "is_done", "items")

    def __init__(self) -> None:
        self.items: deque[tuple[int, int]] = deque()
        self.is_done = False
        self._last = 0

    def take(self) -> tuple[int, int]:
        """The next token and its mask; of an ended row its last one again."""
        if not self.items:
            return self._last, 0
        self._last, mask = self.items.popleft()
        return self._last, mask


def _messages(conversation: Conversation) -> Sequence[Mapping[str, Any]]:
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else conversation
    if not isinstance(messages, (list, tuple)) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise ChatTemplateError("a conversation is a list of messages, each a map with role and content", "messages")
    return messages


def _turns(conversation: Conversation) -> list[dict[str, Any]]:
    """Alternating user and assistant messages, the system's words at the head of the first."""
    messages = [dict(message) for message in _messages(conversation)]
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)
        if not messages or not all(isinstance(m.get("content"), str) for m in (system, messages[0])):
            raise ChatTemplateError("a system message needs a user's text behind it", "messages")
        messages[0]["content"] = system["content"] + "\n\n" + messages[0]["content"]
    for i, message in enumerate(messages):
        if message["role"] != ("assistant" if i % 2 else "user"):
            raise ChatTemplateError(
                f"message {i} is the {message['role']}'s; user and assistant take turns", "messages"
            )
        if not isinstance(message.get("content"), (str, list, tuple)):
            raise ChatTemplateError(f"message {i} has no content, neither a string nor a list of parts", "messages")
    if not messages:
        raise ChatTemplateError("a conversation needs a user message", "messages")
    return messages
