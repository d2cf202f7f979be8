"""Trains the shipped diffusion model from nothing: `python -m examples.train_diffusion --out cluster/demo/diffusion`.

A LLaDA in plain torch with the published tensor names, so that `state_dict()` is what gets saved. Each step hides
part of the answer and asks for what is hidden: any positions of it, or, as block-wise decoding will, some positions of
one block and all behind it. What is kept is an exponential moving average of the weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from examples.sums import (
    END,
    END_OF_TURN,
    GENERATION_LENGTH,
    MASK,
    answer_ids,
    answer_to,
    build_tokenizer,
    draw_question,
    prompt_ids,
    save_tokenizer,
)

REPORT_EVERY = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes, as config.json has them."""

    vocab_size: int
    d_model: int = 64
    n_heads: int = 4
    n_layers: int = 4
    mlp_hidden_size: int = 192
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, inner = shape.d_model, shape.mlp_hidden_size
        self.num_heads, eps = shape.n_heads, shape.rms_norm_eps
        self.attn_norm, self.ff_norm = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.ff_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.ff_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        normed = self.attn_norm(x)
        q, k, v = (
            proj(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(_rotated(q, cos, sin), _rotated(k, cos, sin), v, attn_mask=mask)
        x = x + self.attn_out(mixed.transpose(1, 2).flatten(2))
        normed = self.ff_norm(x)
        out: Tensor = x + self.ff_out(functional.silu(self.ff_proj(normed)) * self.up_proj(normed))
        return out


class Llada(nn.Module):
    """Attention looks both ways; logits at a position are for that position."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        parts = {
            "wte": nn.Embedding(shape.vocab_size, shape.d_model),
            "blocks": nn.ModuleList(Block(shape) for _ in range(shape.n_layers)),
            "ln_f": nn.RMSNorm(shape.d_model, shape.rms_norm_eps),
            "ff_out": nn.Linear(shape.d_model, shape.vocab_size, bias=False),
        }
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))

    def forward(
        self, token_ids: Tensor, is_real: Tensor, rows: Tensor | None = None, is_row: Tensor | None = None
    ) -> Tensor:
        """token_ids, is_real [B, L] -> logits [B, L, V]; nobody looks at what is not real. rows [N, width]: what takes
        the place of embeddings where `is_row`, in order."""
        parts: Any = self.model["transformer"]
        head = self.shape.d_model // self.shape.n_heads
        frequencies = self.shape.rope_theta ** (-torch.arange(0, head, 2) / head)
        angles = (torch.arange(token_ids.shape[1])[:, None] * frequencies).repeat(1, 2)
        x = parts["wte"](token_ids)
        if rows is not None and is_row is not None:
            x = x.masked_scatter(is_row[..., None], rows.to(x.dtype))
        for block in parts["blocks"]:
            x = block(x, angles.cos(), angles.sin(), is_real[:, None, None])
        logits: Tensor = parts["ff_out"](parts["ln_f"](x))
        return logits


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@dataclass(frozen=True, slots=True)
class Batch:
    """Whole sequences padded on the right; `is_answer` marks the positions that are to be generated."""

    token_ids: Tensor
    is_real: Tensor
    is_answer: Tensor


def draw_batch(rng: random.Random, tokenizer: Tokenizer, size: int) -> Batch:
    questions = [draw_question(rng, held_out=False) for _ in range(size)]
    prompts = [prompt_ids(tokenizer, question) for question in questions]
    longest = max(map(len, prompts)) + GENERATION_LENGTH
    token_ids = torch.full((size, longest), tokenizer.token_to_id(END))
    is_real, is_answer = torch.zeros(size, longest, dtype=torch.bool), torch.zeros(size, longest, dtype=torch.bool)
    for row, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
        whole = prompt + answer_ids(tokenizer, question)
        token_ids[row, : len(whole)] = torch.tensor(whole)
        is_real[row, : len(whole)] = True
        is_answer[row, len(prompt) : len(whole)] = True
    return Batch(token_ids, is_real, is_answer)


def hide(batch: Batch) -> Tensor:
    """Which answer positions are hidden [B, L]: each by a chance of its row's own, or a block's and all behind it."""
    size = batch.token_ids.shape[0]
    order = batch.is_answer.cumsum(1) - 1
    chance = torch.rand(size, 1).clamp_min(0.05)
    first = torch.randint(GENERATION_LENGTH, (size, 1)) // 8 * 8
    in_block = (order >= first) & (order < first + 8)
    blockwise = (in_block & (torch.rand(order.shape) < chance)) | (order >= first + 8)
    anywhere = torch.rand(order.shape) < chance
    return batch.is_answer & torch.where(torch.rand(size, 1) < 0.5, blockwise, anywhere)


def train(plan: argparse.Namespace, tokenizer: Tokenizer, on_progress: Callable[[int, float, Llada], None]) -> Llada:
    """The averaged model; `on_progress` sees it, and the loss, every REPORT_EVERY steps."""
    torch.manual_seed(plan.seed)
    rng, steps = random.Random(plan.seed), plan.steps
    model = Llada(Shape(vocab_size=-(-tokenizer.get_vocab_size() // 16) * 16))
    average, mask_id = copy.deepcopy(model), tokenizer.token_to_id(MASK)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    for step in track(range(steps), "training"):
        share = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = plan.learning_rate * max(share, 0.01)
        batch = draw_batch(rng, tokenizer, plan.batch_size)
        hidden = hide(batch)
        logits = model(batch.token_ids.masked_fill(hidden, mask_id), batch.is_real)
        loss = functional.cross_entropy(logits[hidden], batch.token_ids[hidden])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 20))
        with torch.no_grad():
            for kept, current in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(current, 1 - decay)
        if (step + 1) % REPORT_EVERY == 0:
            on_progress(step + 1, loss.item(), average)
    return average


@torch.no_grad()
def accuracy(model: Llada, tokenizer: Tokenizer, count: int) -> float:
    """Share of held-out questions answered exactly, one token a step, most certain first, in blocks of 8."""
    rng, mask_id, right = random.Random(1), tokenizer.token_to_id(MASK), 0
    questions = [draw_question(rng, held_out=True) for _ in range(count)]
    for length in {len(question) for question in questions}:
        group = [question for question in questions if len(question) == length]
        prompt = torch.tensor([prompt_ids(tokenizer, question) for question in group])
        canvas = torch.cat([prompt, torch.full((len(group), GENERATION_LENGTH), mask_id)], dim=1)
        for step in range(GENERATION_LENGTH):
            end = prompt.shape[1] + (step // 8 + 1) * 8
            logits = model(canvas, torch.ones_like(canvas, dtype=torch.bool))
            logits[..., mask_id] = -math.inf
            confidence, token = logits.softmax(-1).max(-1)
            confidence[canvas != mask_id] = -1
            confidence[:, end:] = -1
            rows, best = torch.arange(len(group)), confidence.argmax(1)
            canvas[rows, best] = token[rows, best]
        for question, row in zip(group, canvas[:, prompt.shape[1] :].tolist(), strict=True):
            end_id = tokenizer.token_to_id(END_OF_TURN)
            text = tokenizer.decode(row[: row.index(end_id)] if end_id in row else row, skip_special_tokens=True)
            right += text == answer_to(question)
    return right / count


def save(model: Llada, tokenizer: Tokenizer, folder: Path) -> int:
    """Write the folder as published ones look; returns the size of the weights in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    shape, end = model.shape, tokenizer.token_to_id(END)
    config = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "activation_type": "silu",
        "alibi": False,
        "attention_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": shape.d_model,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_heads,
        "n_layers": shape.n_layers,
        "mlp_hidden_size": shape.mlp_hidden_size,
        "mlp_ratio": shape.mlp_hidden_size // shape.d_model,
        "vocab_size": shape.vocab_size,
        "embedding_size": shape.vocab_size,
        "max_sequence_length": 512,
        "rope": True,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.rms_norm_eps,
        "layer_norm_type": "rms",
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": False,
        "scale_logits": False,
        "input_emb_norm": False,
        "mask_token_id": tokenizer.token_to_id(MASK),
        "eos_token_id": end,
        "pad_token_id": end,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {"eos_token_id": [end, tokenizer.token_to_id(END_OF_TURN)], "pad_token_id": end}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in sorted(model.state_dict().items())}
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # it is written for its owner alone, but ships in a package
    return weights.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the shipped diffusion model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch-size", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = build_tokenizer()

    def on_progress(step: int, loss: float, model: Llada) -> None:
        save(model, tokenizer, arguments.out)
        print(f"step {step}: loss {loss:.4f}, {accuracy(model, tokenizer, 100):.1%} exact", flush=True)

    model = train(arguments, tokenizer, on_progress)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())
    num_bytes = save(model, tokenizer, arguments.out)
    print(f"{accuracy(model, tokenizer, 500):.1%} exact of 500 held-out questions, {num_bytes / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main()
