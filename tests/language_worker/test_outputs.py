"""The prompt collector puts chunks together whatever is computed twice."""

import pytest
import torch

from language_worker import sampler
from language_worker.outputs import PromptCollector
from language_worker.sampler import token_logprob, token_logprobs


def test_recomputed_positions_are_taken_once() -> None:
    logits, ids = torch.randn(10, 20, generator=torch.Generator().manual_seed(0)), list(range(10))
    collector = PromptCollector(ids, vocab_size=20, keep_logits=True, num_top=1)
    assert not collector.add(0, logits[:5])
    assert not collector.add(0, logits[:4])
    assert not collector.add(3, logits[3:8])
    assert collector.add(8, logits[8:])
    assert collector.logits is not None and torch.equal(collector.logits, logits)
    assert collector.logprobs is not None and len(collector.logprobs) == 10
    expected = torch.log_softmax(logits, -1)
    for i, entry in enumerate(collector.logprobs[1:], start=1):
        assert entry is not None and entry.token_id == ids[i]
        assert abs(entry.logprob - expected[i - 1, ids[i]].item()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_judged_together_are_as_those_judged_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In threes, with the last of them left over; against the formulas in float64."""
    monkeypatch.setattr(sampler, "LOGPROB_BYTES", 4 * 50 * 3 + 1)
    logits = (torch.randn(10, 50, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    ids = [7 * i % 40 for i in range(10)]
    together = token_logprobs(logits, ids, 4, num_token_ids=40)
    assert together == [token_logprob(row.float(), t, 4, 40) for row, t in zip(logits, ids, strict=True)]
    exact = torch.log_softmax(logits.double(), -1)[:, :40]
    for entry, row, token_id in zip(together, exact, ids, strict=True):
        assert entry.token_id == token_id and entry.logprob == pytest.approx(float(row[token_id]), abs=1e-5)
        assert entry.rank == 1 + int((row > row[token_id]).sum())
        assert [value for _, value in entry.top] == pytest.approx(
            row.sort(descending=True).values[:4].tolist(), abs=1e-5
        )
        assert all(row[i] == pytest.approx(value, abs=1e-5) for i, value in entry.top)
