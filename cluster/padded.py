"""Padded batches over `LLM`: the tensors that a training repository's own `model(...)` and `generate(...)` take.

    logits = padded_logits(llm, input_ids, attention_mask)
    ids, mask = generate_padded(llm, input_ids, attention_mask, max_new_tokens=32)

Pads are left out before anything is computed and put back afterwards, so a row gives what its tokens give alone:
positions begin with its first token, and no key, state or code comes from a pad. Any model will do.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from cluster.errors import BadRequest
from cluster.llm import LLM
from language_worker.sampling_params import SamplingParams


def padded_logits(llm: LLM, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """input_ids [B, L] -> float32 logits [B, L, vocabulary], zeros at pads.

    attention_mask: [B, L] of any dtype, zero at pads, which are to the left or to the right of a row; None: no pads.
    Raises BadRequest for other shapes, for a row of nothing but pads, and for pads between tokens.
    """
    mask = _mask(input_ids, attention_mask)
    rows = [llm.logits(ids) for ids in _rows(input_ids, mask)]
    logits = torch.zeros((*input_ids.shape, rows[0].shape[1]))
    for i, row in enumerate(rows):
        logits[i, mask[i]] = row
    return logits


def generate_padded(
    llm: LLM,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int = 50,
    pad_token_id: int = 0,
    sampling: SamplingParams | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [B, L + new], mask of the same shape, bool): each row's tokens behind its prompt, then pads where others are
    longer. attention_mask and errors: as of `padded_logits`. sampling: how tokens are chosen, greedily unless given;
    row i of a batch draws by its seed plus i.
    """
    mask = _mask(input_ids, attention_mask)
    base = replace(sampling or SamplingParams(temperature=0.0), max_tokens=max_new_tokens, n=1)
    params = [base if base.seed is None else replace(base, seed=base.seed + i) for i in range(len(input_ids))]
    answers = [answer.outputs[0].token_ids for answer in llm.generate(_rows(input_ids, mask), params)]
    width = max(map(len, answers))
    new_ids = torch.tensor([[*answer, *[pad_token_id] * (width - len(answer))] for answer in answers])
    new_mask = torch.tensor([[column < len(answer) for column in range(width)] for answer in answers])
    return torch.cat((input_ids.to(torch.int64), new_ids), dim=1), torch.cat((mask, new_mask), dim=1)


def _mask(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """[B, L] bool, each row of it one run of tokens."""
    if input_ids.dim() != 2 or not input_ids.numel() or input_ids.is_floating_point():
        raise BadRequest(f"input_ids are {tuple(input_ids.shape)} {input_ids.dtype}; give integers [B, L]", "input_ids")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.to(torch.bool)
    if mask.shape != input_ids.shape:
        raise BadRequest(
            f"attention_mask is {tuple(mask.shape)} for input_ids {tuple(input_ids.shape)}; their shapes must be equal",
            "attention_mask",
        )
    num_runs = mask[:, 0] + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    if wrong := (num_runs != 1).nonzero()[:, 0].tolist():
        raise BadRequest(
            f"row {wrong[0]} of attention_mask must be tokens with pads to their left or right; it has none, or pads "
            "between them",
            "attention_mask",
        )
    return mask


def _rows(input_ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[own].tolist() for row, own in zip(input_ids, mask, strict=True)]
