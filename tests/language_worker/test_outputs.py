"""The prompt collector puts chunks together whatever is computed twice."""

import torch

from language_worker.outputs import PromptCollector


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
