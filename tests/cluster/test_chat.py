"""Chat templates: equal to the reference implementation, and a client's words never become special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cluster.chat import ChatTemplate, load_chat_template
from cluster.errors import ChatTemplateError, ConfigError
from language_worker.tokenizer import Tokenizer
from tests.tiny_tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, TOKEN_IDS, save_tokenizer
from transfer.checkpoint import CheckpointError

IMAGE: dict[str, Any] = {"type": "image_url", "image_url": {"url": "data:a"}}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What number is in the image?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi  \n there"}],
    [{"role": "user", "content": [IMAGE, text("What is this?")]}],
    [{"role": "user", "content": [text("Compare "), IMAGE, text(" with "), IMAGE, IMAGE, text("!")]}],
    [
        {"role": "system", "content": [text("You see digits.")]},
        {"role": "user", "content": [IMAGE, text("one")]},
        {"role": "assistant", "content": "It is 1."},
        {"role": "user", "content": [IMAGE, text("and this?")]},
        {"role": "assistant", "content": [text("It is 2.")]},
        {"role": "user", "content": "sum? \u00e9\u4e2d\U0001f600 {{ messages }} {% x %}"},
    ],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}, {"role": "user", "content": [text("")]}],
    [{"role": "user", "content": "say <tool_call> and </tool_call> or <|im_ or |im_end|>"}],
    [{"role": "user", "name": "ann", "content": "hi"}, {"role": "tool", "tool_call_id": "7", "content": "42"}],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def for_reference(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages as the reference takes them: an image is {"type": "image"}."""
    swap = {"type": "image"}
    return [
        m if isinstance(m["content"], str) else {**m, "content": [swap if p is IMAGE else p for p in m["content"]]}
        for m in messages
    ]


@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_text_and_ids_equal_the_reference(folder: Path, reference: Any, number: int, generation_prompt: bool) -> None:
    messages = CONVERSATIONS[number]
    template, tokenizer = load_chat_template(folder), Tokenizer(folder)
    for variables in ({}, {"add_vision_id": True}):
        options: dict[str, Any] = {"add_generation_prompt": generation_prompt, **variables}
        pieces, media = template.render(messages, **options)
        expected = reference.apply_chat_template(for_reference(messages), tokenize=False, **options)
        assert "".join(piece for piece, _ in pieces) == expected
        ids = reference.apply_chat_template(for_reference(messages), tokenize=True, return_dict=False, **options)
        assert tokenizer.encode_prompt(pieces) == ids
        assert len(media) == ids.count(TOKEN_IDS["<|image_pad|>"])


WORDS = st.sampled_from(
    [*SPECIAL_TOKENS, "<|im_", "end|>", "<", "|", ">", "im_end", "_pad|>", "<|image", " ", "\n", "a", "é"]
)
TEXTS = st.lists(WORDS, max_size=5).map("".join)
CONTENTS = TEXTS | st.lists(TEXTS.map(text) | st.just(IMAGE), max_size=4)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), CONTENTS), min_size=1, max_size=4))
def test_special_ids_come_from_the_template_alone(
    tmp_path_factory: pytest.TempPathFactory, conversation: list[tuple[str, Any]]
) -> None:
    """The special ids of a prompt are those of the same conversation with harmless words, whatever the words are; and
    the text is the reference's."""
    path = tmp_path_factory.getbasetemp()
    if not (path / "tokenizer.json").exists():
        save_tokenizer(path)
    template, tokenizer = load_chat_template(path), Tokenizer(path)
    special = {TOKEN_IDS[token] for token in SPECIAL_TOKENS}

    def special_ids(change: Any) -> tuple[list[int], str]:
        messages = [{"role": role, "content": change(content)} for role, content in conversation]
        pieces, _ = template.render(messages)
        ids = tokenizer.encode_prompt(pieces)
        return [i for i in ids if i in special], tokenizer.decode(ids, skip_special_tokens=False)

    def harmless(content: Any) -> Any:
        return "x" if isinstance(content, str) else [p if p is IMAGE else text("x") for p in content]

    ids, shown = special_ids(lambda content: content)
    assert ids == special_ids(harmless)[0]
    words = [
        c if isinstance(c, str) else "".join(p.get("text", "") for p in c if p is not IMAGE) for _, c in conversation
    ]
    assert all(word in shown for (_, c), word in zip(conversation, words, strict=True) if isinstance(c, str))


def test_a_literal_joined_from_two_parts_stays_text() -> None:
    template = ChatTemplate(CHAT_TEMPLATE, special_literals=SPECIAL_TOKENS)
    pieces, _ = template.render([{"role": "user", "content": [text("<|im_"), text("end|>")]}])
    assert ("<|im_end|>", False) in pieces


def test_a_literal_joined_by_the_template_stays_text() -> None:
    """The template removes what stands between two halves."""
    source = "{% for m in messages %}<s>{{ m.content.replace('</think>', '') }}</s>{% endfor %}"
    template = ChatTemplate(source, special_literals=["<s>", "</s>", "<|im_end|>"])
    pieces, _ = template.render([{"role": "user", "content": "<|im_</think>end|>"}])
    assert pieces == [("<s>", True), ("<|im_end|>", False), ("</s>", True)]


def test_a_literal_half_from_the_template_stays_text() -> None:
    template = ChatTemplate("{% for m in messages %}<{{ m.name }}|>{% endfor %}", special_literals=["<|user|>", "<a|>"])
    assert template.render([{"role": "user", "name": "|user", "content": ""}])[0] == [("<|user|>", False)]
    assert template.render([{"role": "user", "name": "a", "content": ""}])[0] == [("<a|>", False)]


def test_roles_build_the_templates_own_literals() -> None:
    template = ChatTemplate(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}", special_literals=["<|user|>"]
    )
    pieces, _ = template.render([{"role": "user", "content": "<|user|>"}])
    assert pieces == [("<|user|>", True), ("<|user|>", False)]


def test_tool_arguments_and_their_names_are_the_clients() -> None:
    loop = "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
    source = "{% for m in messages %}" + loop + "{% endfor %}"
    template = ChatTemplate(source, special_literals=["<|im_end|>"])
    call = {"type": "function", "function": {"name": "f", "arguments": {"<|im_end|>": "<|im_end|>"}}}
    pieces, _ = template.render([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert [piece for piece in pieces if piece[0] == "<|im_end|>"] == [("<|im_end|>", False)] * 2


def test_a_template_that_looks_into_the_text_still_sees_it() -> None:
    source = (
        "{% for m in messages %}{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] | trim }}"
        "{% else %}none{% endif %}{% endfor %}"
    )
    template = ChatTemplate(source, special_literals=["<think>x", "<|im_end|>"])
    pieces, _ = template.render([{"role": "assistant", "content": "why</think>  because <|im_end|> "}])
    assert pieces == [("because ", True), ("<|im_end|>", False)]


def test_a_template_that_changes_letters_falls_back() -> None:
    source = "{% for m in messages %}<|im_end|>{{ m.content | upper }}{% endfor %}"
    template = ChatTemplate(source, special_literals=["<|im_end|>", "<|A|>"])
    assert template.render([{"role": "user", "content": "hello"}])[0] == [("<|im_end|>HELLO", True)]
    assert template.render([{"role": "user", "content": "x<|A|>y"}])[0] == [
        ("<|im_end|>X", True),
        ("<|A|>", False),
        ("Y", True),
    ]
    with pytest.raises(ChatTemplateError, match="special tokens"):
        template.render([{"role": "user", "content": "<|im_end|>"}])


def test_private_use_characters_of_a_client_come_through() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", special_literals=["<|im_end|>"])
    content = "".join(map(chr, range(0xF0000, 0xF0100))) + "<|im_end|>"
    assert template.render([{"role": "user", "content": content}])[0] == [(content[:-10], True), ("<|im_end|>", False)]


def test_a_template_for_strings_gets_strings_and_no_images() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}")
    assert template.render([{"role": "user", "content": [text(" a"), text("b ")]}])[0] == [("[a\nb]", True)]
    with pytest.raises(ChatTemplateError, match="text only"):
        template.render([{"role": "user", "content": [IMAGE]}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system role') }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 100 }}{% endfor %}",
        "{{ 'x' * 10**9 }}",
        "{{ 2 ** 1000000000 }}",
        "{{ '%99999999d' % 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].nothing.more }}",
        "{{ 1 // 0 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_template_is_bounded_and_its_refusals_are_typed(source: str) -> None:
    template = ChatTemplate(source, special_literals=["<s>"], max_chars=10_000)
    with pytest.raises(ChatTemplateError):
        template.render([{"role": "user", "content": "x"}])


def test_a_generation_block_shows_its_body() -> None:
    body = "{% generation %}{{ m.content }}{% endgeneration %}{% if loop.last %}{% break %}{% endif %}"
    source = "{% for m in messages %}" + body + "{% endfor %}"
    assert ChatTemplate(source).render([{"role": "assistant", "content": "x"}])[0] == [("x", True)]


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_reserved_names_are_not_for_kwargs(name: str) -> None:
    with pytest.raises((ChatTemplateError, TypeError)):
        ChatTemplate("x").render([], **{name: 5, "documents": 1})


def test_where_a_template_is_found(tmp_path: Path) -> None:
    def shown() -> str:
        return load_chat_template(tmp_path).render([])[0][0][0]

    with pytest.raises(ConfigError, match="no chat template"):
        load_chat_template(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named {{ bos_token }}"}]
    config.write_text(json.dumps({"chat_template": named, "bos_token": {"content": "<s>"}}))
    assert shown() == "named <s>"
    config.write_text(json.dumps({"chat_template": "string {{ eos_token }}", "eos_token": "</s>"}))
    assert shown() == "string </s>"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert shown() == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert shown() == "jinja"
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ConfigError, match="does not compile"):
        load_chat_template(tmp_path)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        load_chat_template(tmp_path)


def test_the_reference_would_have_parsed_the_clients_literal(reference: PreTrainedTokenizerFast) -> None:
    """The fault that the pieces guard against is real: tokenizing the plain text makes the client's literal special."""
    ids = reference.apply_chat_template(
        [{"role": "user", "content": "<|im_end|>"}], tokenize=True, return_dict=False, add_generation_prompt=False
    )
    assert list(ids).count(TOKEN_IDS["<|im_end|>"]) == 3
