"""Which tokens a step's logits choose: one per sample, or with drafts as many as turn out right and one more.

Pure but for the sampler's arithmetic; changes no state, so that a step that failed can be run again.
"""

from collections.abc import Sequence

import torch

from language_worker.sampler import Choice, best_tokens, sample
from language_worker.sampling_state import SamplingState
from language_worker.step_logits import StepLogits


def choose(
    step: StepLogits, served: Sequence[list[SamplingState]], *, num_token_ids: int | None = None
) -> list[list[list[Choice]]]:
    """For every sampling window and each of the samples that its logits serve: the tokens chosen, in order.

    A window with drafts serves one sample. num_token_ids: as for `sample`.
    """
    if any(window.drafts for window in step.sampling):
        return _choose_with_drafts(step, served, num_token_ids)
    if all(len(states) == 1 for states in served):
        states = [alone[0] for alone in served]
        return [[[choice]] for choice in sample(step.sampled(), states, num_token_ids=num_token_ids)]
    rows = [row for row, states in zip(step.sample_rows, served, strict=True) for _ in states]
    flat = [state for states in served for state in states]
    choices = iter(sample(step.logits[rows], flat, num_token_ids=num_token_ids))
    return [[[next(choices)] for _ in states] for states in served]


def _choose_with_drafts(
    step: StepLogits, served: Sequence[list[SamplingState]], num_token_ids: int | None
) -> list[list[list[Choice]]]:
    """In rounds: all windows whose drafts were right so far draw their next token together."""
    flat = [state for states in served for state in states]
    drafts = [window.drafts for window, states in zip(step.sampling, served, strict=True) for _ in states]
    first = [row for row, states in zip(step.sample_rows, served, strict=True) for _ in states]
    chosen: list[list[Choice]] = [[] for _ in flat]
    if all(state.is_plain_greedy for state in flat):
        _match_greedy(step.logits[:, :num_token_ids], first, drafts, chosen)
    else:
        going = list(range(len(flat)))
        while going:
            states = [flat[i].after([c.token_id for c in chosen[i]]) for i in going]
            rows = [first[i] + len(chosen[i]) for i in going]
            choices = sample(step.logits[rows], states, num_token_ids=num_token_ids)
            for i, choice in zip(list(going), choices, strict=True):
                chosen[i].append(choice)
            going = [i for i in going if _is_right(chosen[i], drafts[i])]
    parts = iter(chosen)
    return [[next(parts) for _ in states] for states in served]


def _is_right(chosen: list[Choice], drafts: tuple[int, ...]) -> bool:
    """The latest choice was foreseen, so that the logits behind it hold."""
    return len(chosen) <= len(drafts) and chosen[-1].token_id == drafts[len(chosen) - 1]


def _match_greedy(
    logits: torch.Tensor, first: list[int], drafts: list[tuple[int, ...]], chosen: list[list[Choice]]
) -> None:
    """One argmax for all rows."""
    best = best_tokens(logits)
    for row, guesses, own in zip(first, drafts, chosen, strict=True):
        own.append(Choice(token_id=best[row]))
        while _is_right(own, guesses):
            own.append(Choice(token_id=best[row + len(own)]))
