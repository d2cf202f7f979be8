"""Chat messages -> prompt pieces, through the template that the checkpoint brings.

Owns the reading of the template and of its special tokens from the model folder, and the rendering. What a client wrote
is never parsed for special tokens: a rendering is a list of (text, trusted) pieces, for `Tokenizer.encode_prompt`, in
which literals with a client's hand in them are untrusted. Knows nothing of HTTP, token ids or how images are fetched:
media references come back as they were given, in prompt order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes

from cluster.errors import ChatTemplateError, ConfigError, NoChatTemplate
from cluster.template_masking import Masker, Masking, strings_in
from cluster.template_sandbox import create_environment, render_bounded
from language_worker.nanochat_files import read_published
from transfer.checkpoint_json import parse_object, read_text, shown

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
RESERVED_NAMES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
IMAGE_MARK = "\ufdd0"  # no character: stands for an image while a template that knows only text is rendered
END_OF_REASONING = "</think>"
MEDIA_TYPES = frozenset({"image", "image_url"})


Pieces = list[tuple[str, bool]]


class ChatTemplate:
    """One compiled chat template.

    source: jinja2 source. special_tokens: names the template may use (`bos_token`, ...) -> their text.
    special_literals: every text that the tokenizer would turn into one special id. max_chars: bound of a rendering.
    takes_tools: it tells the model of tools. has_reasoning: it tells reasoning from answers.
    placeholder: what stands for an image in a template that takes text only; "": such a template takes no images.
    system_prompt: what a conversation without a system message begins with; "": nothing.
    Raises ConfigError if the source does not compile.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        special_literals: Collection[str] = (),
        max_chars: int = 4_000_000,
        placeholder: str = "",
        system_prompt: str = "",
    ) -> None:
        self._special_tokens = dict(special_tokens or {})
        self._max_chars = max_chars
        self._placeholder = placeholder
        self._system_prompt = system_prompt
        try:
            environment = create_environment()
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except jinja2.exceptions.TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template does not compile: {error}; repair the checkpoint's template"
            ) from error
        constants = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
        self._masker = Masker({*special_literals, *self._special_tokens.values()}, constants)
        self.takes_tools = "tools" in jinja2.meta.find_undeclared_variables(tree)
        self.has_reasoning = END_OF_REASONING in source
        self._takes_parts = any(_mentions_content(loop.iter) for loop in tree.find_all(jinja2.nodes.For))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> tuple[Pieces, list[Any]]:
        """(pieces of the prompt, media references in the messages' order); `kwargs` are further template variables.

        Raises ChatTemplateError if the template refuses the messages, takes no media, or passes a bound.
        """
        clash = RESERVED_NAMES & kwargs.keys()
        if clash:
            raise ChatTemplateError(f"chat_template_kwargs may not set {sorted(clash)[0]!r}", "chat_template_kwargs")
        media: list[Any] = []
        if any(IMAGE_MARK in text for text in strings_in([list(messages), tools, kwargs])):
            raise ChatTemplateError("the messages hold U+FDD0, which is no character; remove it", "messages")
        plain_messages = [self._message(message, media) for message in self._with_system(messages)]
        client = {"messages": plain_messages, "tools": tools, "kwargs": kwargs}
        text = self._render(client, add_generation_prompt)
        return self._with_images(self._pieces(text, client, add_generation_prompt)), media

    def _with_system(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """With the model's own system message in front, unless there is one."""
        if not self._system_prompt or any(message.get("role") in ("system", "developer") for message in messages):
            return messages
        return [{"role": "system", "content": self._system_prompt}, *messages]

    def _with_images(self, pieces: Pieces) -> Pieces:
        """With the placeholder, as the template's own word, where an image stood in text."""
        if self._takes_parts or not self._placeholder:
            return pieces
        placed: Pieces = []
        for text, is_trusted in pieces:
            for i, part in enumerate(text.split(IMAGE_MARK)):
                placed += [(self._placeholder, True)] * (i > 0) + [(part, is_trusted)] * bool(part)
        return placed

    def _message(self, message: Mapping[str, Any], media: list[Any]) -> dict[str, Any]:
        """The message as templates expect it: images as {"type": "image"}, their references set aside."""
        result = dict(message)
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            parts = [_part(part, media) for part in content]
            result["content"] = parts if self._takes_parts else self._joined_text(parts)
        return result

    def _joined_text(self, parts: Sequence[Mapping[str, Any]]) -> str:
        """For templates that want content as one string."""
        if not self._placeholder and any(part["type"] != "text" for part in parts):
            raise ChatTemplateError("the model's chat template takes text only; remove the images", "messages")
        return "\n".join(part["text"] if part["type"] == "text" else IMAGE_MARK for part in parts)

    def _render(self, client: Mapping[str, Any], add_generation_prompt: bool) -> str:
        variables = {
            **self._special_tokens,
            **client["kwargs"],
            "messages": client["messages"],
            "tools": client["tools"],
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return render_bounded(self._template, variables, self._max_chars)
        except jinja2.exceptions.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}", "messages") from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ChatTemplateError(
                f"the model's chat template failed on these messages: {what}", "messages"
            ) from error

    def _pieces(self, text: str, client: Mapping[str, Any], add_generation_prompt: bool) -> Pieces:
        maskings = self._masker.maskings([text, *strings_in(client)])
        if maskings is None:
            raise ChatTemplateError("the messages use every private-use character; remove some of them", "messages")
        for masking in maskings:
            masked = self._render_masked(masking, client, add_generation_prompt)
            if masked is not None and masking.unmask(masked) == text:
                return self._masker.split(masked, text)
        raise ChatTemplateError(
            "the messages spell special tokens in a place where the model's chat template interprets them", "messages"
        )

    def _render_masked(self, masking: Masking, client: Mapping[str, Any], add_generation_prompt: bool) -> str | None:
        masked = masking.mask(client)
        for message, original in zip(masked["messages"], client["messages"], strict=True):
            if original.get("role") in ROLES:
                message["role"] = original["role"]  # one of ours, not a client's words
            if isinstance(original.get("content"), list):
                for part, original_part in zip(message["content"], original["content"], strict=True):
                    part["type"] = original_part["type"]
        try:
            return self._render(masked, add_generation_prompt)
        except ChatTemplateError:
            return None


def load_chat_template(
    model_dir: str | Path, *, max_chars: int = 4_000_000, placeholder: str = "", system_prompt: str = ""
) -> ChatTemplate:
    """The template of a Hugging Face model folder: `chat_template.jinja`, else `chat_template.json`, else the
    `chat_template` of tokenizer_config.json (a string, or a list of named ones, of which `default` is taken).

    placeholder, system_prompt: see `ChatTemplate`. Raises ConfigError if there is none or it cannot
    be used, CheckpointError for a file that cannot be read.
    """
    folder = Path(model_dir)
    config = _read_json(folder / "tokenizer_config.json")
    source = _template_source(folder, config)
    if source is None:
        raise NoChatTemplate(
            f"{folder} holds no chat template; add chat_template.jinja, or chat_template in tokenizer_config.json"
        )
    special = {name: text for name in config if name.endswith("_token") and (text := _token_text(config[name]))}
    return ChatTemplate(
        source,
        special_tokens=special,
        special_literals=_special_literals(folder, config),
        max_chars=max_chars,
        placeholder=placeholder,
        system_prompt=system_prompt,
    )


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    jinja_file = folder / "chat_template.jinja"
    if jinja_file.is_file():
        return read_text(jinja_file)
    candidates = (_read_json(folder / "chat_template.json").get("chat_template"), config.get("chat_template"))
    for candidate in candidates:
        if isinstance(candidate, list):
            candidate = {entry.get("name"): entry.get("template") for entry in candidate if isinstance(entry, dict)}
        if isinstance(candidate, dict):
            candidate = candidate.get("default")
        if isinstance(candidate, str):
            return candidate
        if candidate is not None:
            raise ConfigError(
                f"{folder} has chat_template = {shown(candidate)}; a string is needed, or a list of "
                '{"name": ..., "template": ...}'
            )
    return None


def _special_literals(folder: Path, config: Mapping[str, Any]) -> set[str]:
    """Contents of the added tokens that are special, from both files that may list them."""
    decoder = config.get("added_tokens_decoder")
    entries = list(decoder.values()) if isinstance(decoder, dict) else []
    added = _read_json(folder / "tokenizer.json").get("added_tokens")
    entries += added if isinstance(added, list) else []
    extra = config.get("additional_special_tokens")
    literals = {_token_text(token) for token in (extra if isinstance(extra, list) else [])}
    literals |= {_token_text(e) for e in entries if isinstance(e, dict) and e.get("special") is True}
    return {literal for literal in literals if literal}


def _token_text(token: Any) -> str | None:
    """A token's text: the string itself, or the `content` of its description."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _read_json(path: Path) -> dict[str, Any]:
    text = read_published(path.parent, path.name)
    return {} if text is None else parse_object(text, path)


def _part(part: Any, media: list[Any]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind not in MEDIA_TYPES:
        raise ChatTemplateError(f"content parts of type {kind!r} are not supported; use text and image_url", "messages")
    reference = part.get("image_url", part.get("image"))
    media.append(reference.get("url") if isinstance(reference, Mapping) else reference)
    return {"type": "image"}


def _mentions_content(node: jinja2.nodes.Node) -> bool:
    """Does this loop go over something called content: message.content, message['content'], content?"""
    names = [n.name for n in node.find_all(jinja2.nodes.Name)] + [n.attr for n in node.find_all(jinja2.nodes.Getattr)]
    constants = [n.value for n in node.find_all(jinja2.nodes.Const)]
    itself = [getattr(node, "name", None), getattr(node, "attr", None)]
    return "content" in [*names, *constants, *itself]
