"""The task of the shipped diffusion model: up to three sums of two-digit numbers, answered in full.

    question   47+85 12+39          answer   47+85=132 12+39=51

Every answer is exact or wrong, and much of it can be known at once, so that speed and quality are both measurable. One
sum in eleven is never shown in training. Owns the tokenizer in LLaDA's layout (its special tokens and chat template).
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END, MASK, END_OF_TURN = "<|endoftext|>", "<|mdm_mask|>", "<|eot_id|>"
SPECIAL_TOKENS = ("<|startoftext|>", END, MASK, "<|start_header_id|>", "<|end_header_id|>", END_OF_TURN)
VOCABULARY_SIZE = 288
GENERATION_LENGTH = 32  # tokens: three sums, their separators, and the end of the turn
HELD_OUT_EVERY = 11

CHAT_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = '<|startoftext|>' + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def is_held_out(left: int, right: int) -> bool:
    """Whether the sum is kept for measuring."""
    return (7 * left + right) % HELD_OUT_EVERY == 0


def draw_question(rng: random.Random, *, held_out: bool) -> str:
    """One to three sums, all of them of one kind."""
    sums = []
    for _ in range(rng.choice((1, 2, 2, 3, 3, 3))):
        while is_held_out(*(pair := (rng.randint(10, 99), rng.randint(10, 99)))) != held_out:
            pass
        sums.append(f"{pair[0]}+{pair[1]}")
    return " ".join(sums)


def answer_to(question: str) -> str:
    """The exact answer."""
    return " ".join(f"{part}={sum(map(int, part.split('+')))}" for part in question.split())


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE; every digit and sign is a token of its own, the words of the template are one each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\n+|."), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant system\n\n"] * 8, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json with the published template."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|startoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": 512,
        "pad_token": END,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def prompt_ids(tokenizer: Tokenizer, question: str) -> list[int]:
    """A conversation of one question, as the template renders it."""
    text = (
        f"<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    return list(tokenizer.encode(text).ids)


def answer_ids(tokenizer: Tokenizer, question: str) -> list[int]:
    """The answer as the model is to write it: the end of the turn, then the end of text to the canvas' end."""
    ids = [*tokenizer.encode(answer_to(question)).ids, tokenizer.token_to_id(END_OF_TURN)]
    return ids + [tokenizer.token_to_id(END)] * (GENERATION_LENGTH - len(ids))
