"""How sure a mask's token is: the same beside drawn rows as alone, and as the softmax in float64 says."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from language_worker.canvas import Canvas
from language_worker.denoise_choice import Candidates, choose_tokens
from language_worker.diffusion_params import DiffusionParams
from language_worker.sampling_params import SamplingParams
from language_worker.sampling_state import SamplingState

NUM_IDS, MASK, EOS, LENGTH = 40, 39, 38, 64


def sure_logits(seed: int) -> torch.Tensor:
    """Rows whose best ids have probabilities of 0.9 to 1 - 1e-6: their log-probabilities lie closer than float32 can
    tell beside a log-sum-exp of 30."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(LENGTH, NUM_IDS, generator=generator)
    best = torch.randint(0, EOS, (LENGTH,), generator=generator)
    logits[torch.arange(LENGTH), best] = 7 + 12 * torch.rand(LENGTH, generator=generator)
    return logits + 17


def choose(logits: torch.Tensor, temperatures: Sequence[float], params: DiffusionParams) -> Candidates:
    """One canvas for each temperature, all of the same logits."""
    canvases, states = [], []
    for index, temperature in enumerate(temperatures):
        canvases.append(Canvas([1], LENGTH, params, mask_id=MASK))
        own = SamplingParams(max_tokens=LENGTH, temperature=temperature, seed=index, diffusion=params)
        states.append(SamplingState(own, index=0, seed=index, prompt=[1], stop_ids=()))
    rows = logits.repeat(len(temperatures), 1)
    return choose_tokens(rows, canvases, states, eos_ids=(EOS,), num_token_ids=NUM_IDS)


def test_a_greedy_row_beside_drawn_ones_is_as_sure_as_alone() -> None:
    params = DiffusionParams(block_length=LENGTH)
    logits = sure_logits(0)
    alone = choose(logits, [0.0], params)
    together = choose(logits, [0.8, 0.0, 1.5], params)
    greedy = slice(LENGTH, 2 * LENGTH)
    assert together.token_ids[greedy] == alone.token_ids
    assert together.confidence[greedy] == alone.confidence
    assert together.entropy[greedy] == alone.entropy


def test_confidence_keeps_its_digits_close_to_one() -> None:
    """Drawn tokens, and those judged without the end of text: within four float32 steps of float64."""
    for params in (DiffusionParams(block_length=LENGTH), DiffusionParams(block_length=LENGTH, defer_eos=True)):
        logits = sure_logits(1)
        found = choose(logits, [0.5], params)
        allowed = logits.double()
        allowed[:, [MASK, EOS] if params.defer_eos else [MASK]] = -torch.inf
        wanted = allowed.softmax(-1)[torch.arange(LENGTH), torch.tensor(found.token_ids)]
        sure = wanted > 0.5
        assert int(sure.sum()) > LENGTH // 2
        error = (torch.tensor(found.confidence, dtype=torch.float64) - wanted).abs()[sure]
        assert float(error.max()) <= 4 * torch.finfo(torch.float32).eps


def test_where_only_the_end_of_text_may_be_chosen_deferring_it_is_no_nan() -> None:
    logits = torch.full((LENGTH, NUM_IDS), -torch.inf)
    logits[:, EOS] = 3.0
    for temperatures in ([0.0], [0.7]):
        found = choose(logits, temperatures, DiffusionParams(block_length=LENGTH, defer_eos=True))
        assert found.token_ids == [EOS] * LENGTH
        assert found.confidence == [0.0] * LENGTH
