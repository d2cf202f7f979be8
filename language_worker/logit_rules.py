"""LogitRules: what one sample's parameters do to its logits before temperature and filters.

In this order: repetition penalty, presence and frequency penalties, logit bias; then what may not be chosen is set to
minus infinity: all but the allowed ids, the banned ids, and while the output is shorter than min_tokens what would end
it. What does not change from token to token is turned into tensors once.
"""

from collections.abc import Mapping, Sequence

import torch

from language_worker.sampling_params import SamplingParams


class LogitRules:
    """Rules of one sample. prompt: its token ids. stop_ids: what ends the output (EOS and stop token ids)."""

    __slots__ = ("_allowed", "_banned", "_bias", "_bias_ids", "_params", "_prompt_ids", "_stop_ids")

    def __init__(self, params: SamplingParams, *, prompt: Sequence[int], stop_ids: Sequence[int]) -> None:
        self._params = params
        self._prompt_ids = sorted(set(prompt)) if params.repetition_penalty != 1.0 else []
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        allowed = params.allowed_token_ids
        self._allowed = None if allowed is None else torch.tensor(sorted(set(allowed)), dtype=torch.int64)
        self._banned = torch.tensor(sorted(set(params.banned_token_ids)), dtype=torch.int64)
        self._stop_ids = torch.tensor(sorted(set(stop_ids)) if params.min_tokens else [], dtype=torch.int64)

    @staticmethod
    def are_needed(params: SamplingParams, stop_ids: Sequence[int]) -> bool:
        """Whether these parameters change any logit."""
        restricts = params.allowed_token_ids is not None or bool(params.banned_token_ids)
        holds_back = params.min_tokens > 0 and bool(stop_ids)
        return params.has_penalties or bool(params.logit_bias) or restricts or holds_back

    def apply(self, row: torch.Tensor, counts: Mapping[int, int], num_generated: int) -> None:
        """Change row [V] float32 in place. counts: how often the output of `num_generated` ids holds each of them."""
        self._penalize(row, counts)
        if len(self._bias):
            row[self._on(row, "_bias_ids")] += self._on(row, "_bias")
        if self._allowed is not None:
            allowed = self._on(row, "_allowed")
            kept = row[allowed]
            row.fill_(-torch.inf)
            row[allowed] = kept
        if len(self._banned):
            row[self._on(row, "_banned")] = -torch.inf
        if len(self._stop_ids) and num_generated < self._params.min_tokens:
            row[self._on(row, "_stop_ids")] = -torch.inf

    def _penalize(self, row: torch.Tensor, counts: Mapping[int, int]) -> None:
        params, device = self._params, row.device
        if params.repetition_penalty != 1.0:
            seen = torch.tensor([*self._prompt_ids, *counts], dtype=torch.int64, device=device)  # may repeat: harmless
            values = row[seen]
            row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        if counts and (params.presence_penalty or params.frequency_penalty):
            ids = torch.tensor(list(counts), dtype=torch.int64, device=device)
            numbers = torch.tensor(list(counts.values()), dtype=row.dtype, device=device)
            row[ids] -= params.presence_penalty + params.frequency_penalty * numbers

    def _on(self, row: torch.Tensor, name: str) -> torch.Tensor:
        """One of the prepared tensors, on the row's device from now on."""
        tensor: torch.Tensor = getattr(self, name)
        if tensor.device != row.device:
            tensor = tensor.to(row.device)
            setattr(self, name, tensor)
        return tensor
