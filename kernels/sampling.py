"""Sampling over large vocabularies: softmax statistics, top-k/top-p/min-p cuts, and the Gumbel-max draw.

Each reads the logits as they are (any float dtype), computes in float32 and materialises neither float32 logits nor
probabilities of the whole batch. Ties take the lowest id everywhere. Random numbers come from `kernels.philox`: a
row's draw depends on its own seed, sample and position, and on nothing else in the batch.
"""

from __future__ import annotations

import dataclasses

import torch

from kernels.dispatch import twin
from kernels.philox import GUMBEL_BOUND, gumbel, gumbel_of, uniform_rows

ROW_SLAB, COLUMN_CHUNK = 64, 16384  # of the torch path: what is in float32 at one time
FEW_ROWS = 4  # are taken in wider chunks, for fewer calls
LOWEST = torch.finfo(torch.float32).min
DRAW_CHUNK = 65536  # ids whose noise is drawn at one time: the generator's words stay in the cache


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxStatistics:
    """Per row [R] of logits: the largest (float32) and its lowest id (int64), log-sum-exp, confidence (probability of
    the largest) and entropy (nats), float32. A row of -inf alone has -inf, 0, -inf, 0 and 0."""

    maximum: torch.Tensor
    argmax: torch.Tensor
    log_sum_exp: torch.Tensor
    confidence: torch.Tensor
    entropy: torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """What a filter keeps of each row [R]: logits above `threshold` (float32), and those equal to it up to id
    `last_tie` (int64)."""

    threshold: torch.Tensor
    last_tie: torch.Tensor


def softmax_statistics(logits: torch.Tensor) -> SoftmaxStatistics:
    """Statistics of softmax(logits) per row, in one pass over logits [R, V] with V >= 1.

    -inf logits have probability 0; NaN and +inf are not supported. Raises ValueError for another shape.
    """
    _check_logits("softmax_statistics", logits)
    triton = twin("sampling", logits)
    if triton is not None:
        return SoftmaxStatistics(**triton.softmax_statistics(logits))
    starts = range(0, max(1, logits.shape[0]), ROW_SLAB)
    columns = [_slab_statistics(logits[start : start + ROW_SLAB]) for start in starts]
    maximum, argmax, mass, spread = (torch.cat(parts) for parts in zip(*columns, strict=True))
    log_mass = mass.log()
    return SoftmaxStatistics(
        maximum=maximum,
        argmax=argmax,
        log_sum_exp=maximum + log_mass,
        confidence=torch.where(mass > 0, 1 / mass, 0.0),
        entropy=torch.where(mass > 0, log_mass - spread / mass, 0.0),
    )


def filter_cut(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> Cut:
    """Top-k, then top-p of what that kept, then min-p, as one cut per row.

    logits: [R, V], V >= 1. temperature, top_p, min_p: [R] float32; top_k: [R] int64. Off: top_k <= 0, top_p >= 1,
    min_p <= 0. Top-p keeps the fewest tokens of softmax(logits / temperature) whose probability reaches top_p; min-p
    those at least min_p times as probable as the best. At temperature 0 only the best is kept. At least one always is,
    if any logit is finite. Equal logits are taken by rising id.
    """
    _check_logits("filter_cut", logits)
    _check_rows("filter_cut", logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    triton = twin("sampling", logits)
    if triton is not None:
        return Cut(**triton.filter_cut(logits, temperature, top_k, top_p, min_p))
    vocab = logits.shape[1]
    k = torch.where(temperature > 0, torch.where(top_k > 0, top_k.clamp_max(vocab), vocab), 1)
    widest = int(k.max()) if len(k) else vocab
    ordered = torch.topk(logits, widest, dim=1).values.float() if widest <= vocab // 8 else _descending(logits)
    best = ordered[:, :1].clamp_min(LOWEST)  # of a row of -inf alone nothing has weight
    weights = ordered.sub(best).div_(temperature.clamp_min(1e-30)[:, None]).exp_()
    if bool((k < ordered.shape[1]).any()):
        weights.masked_fill_(torch.arange(ordered.shape[1], device=logits.device) >= k[:, None], 0.0)
    reached = weights.cumsum(1, dtype=torch.float64)
    enough = torch.searchsorted(reached, top_p[:, None] * reached[:, -1:])[:, 0] + 1
    count = torch.minimum(k, torch.where(top_p < 1, enough, vocab))  # each rule keeps a beginning of the ranking
    if bool((min_p > 0).any()):
        count = torch.minimum(count, (weights >= min_p[:, None]).sum(1))
    count = count.clamp_(1, ordered.shape[1])
    threshold = ordered.gather(1, count[:, None] - 1)
    num_ties = count - (ordered[:, : int(count.max()) if len(count) else 0] > threshold).sum(1)
    is_tie = logits.float() == threshold
    last_tie = torch.full_like(count, vocab - 1)
    if bool((is_tie.sum(1) > num_ties).any()):
        last_tie = (is_tie.cumsum(1) < num_ties[:, None]).sum(1)
    return Cut(threshold=threshold[:, 0], last_tie=last_tie)


def keep_mask(logits: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Which logits [R, V] a cut keeps: bool [R, V]; never a logit of -inf."""
    wide, threshold = logits.float(), cut.threshold[:, None]
    kept = wide >= threshold
    if bool((cut.last_tie < logits.shape[1] - 1).any()):
        ids = torch.arange(logits.shape[1], device=logits.device, dtype=torch.int32)
        kept &= (wide > threshold) | (ids <= cut.last_tie[:, None].to(torch.int32))
    if bool((threshold == -torch.inf).any()):
        kept &= wide > -torch.inf
    return kept


def gumbel_max(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    samples: torch.Tensor,
    positions: torch.Tensor,
    cut: Cut | None = None,
) -> torch.Tensor:
    """One id per row, drawn from softmax(logits / temperature) over what `cut` keeps: [R] int64.

    logits: [R, V], V >= 1. temperature: [R] float32, 0 takes the argmax. seeds, samples, positions: [R] int64; the
    noise of an id is Gumbel(seed, position, sample, id), the same on every path and device. A row of -inf gives 0.
    """
    _check_logits("gumbel_max", logits)
    _check_rows("gumbel_max", logits, temperature=temperature, seeds=seeds, samples=samples, positions=positions)
    triton = twin("sampling", logits)
    if triton is not None:
        bounds = None if cut is None else (cut.threshold, cut.last_tie)
        return triton.gumbel_max(logits, temperature, seeds, samples, positions, bounds)  # type: ignore[no-any-return]
    slabs = range(0, logits.shape[0], ROW_SLAB)
    drawn = [
        _draw_slab(
            logits[s],
            temperature[s],
            (seeds[s], positions[s], samples[s]),
            None if cut is None else Cut(threshold=cut.threshold[s], last_tie=cut.last_tie[s]),
        )
        for s in (slice(start, start + ROW_SLAB) for start in slabs)
    ]
    return torch.cat(drawn) if drawn else torch.empty(0, dtype=torch.int64, device=logits.device)


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, log_sum_exp: torch.Tensor) -> torch.Tensor:
    """Log-probability [R] float32 of one token per row [R] int64, given the rows' log-sum-exps."""
    return logits.gather(1, token_ids[:, None])[:, 0].float() - log_sum_exp


def _slab_statistics(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(largest, its id, sum of exp(x - largest), sum of exp(x - largest) (x - largest)) of some rows."""
    best = torch.full(logits.shape[:1], -torch.inf, device=logits.device)
    place = torch.zeros(logits.shape[:1], dtype=torch.int64, device=logits.device)
    mass, spread = torch.zeros_like(best), torch.zeros_like(best)
    step = COLUMN_CHUNK * max(1, FEW_ROWS // max(1, len(logits)))
    for start in range(0, logits.shape[1], step):
        chunk = logits[:, start : start + step].float()
        found = argmax_rows(chunk)
        here = chunk.gather(1, found[:, None])[:, 0]
        place = torch.where(here > best, found + start, place)
        higher = torch.maximum(best, here)
        safe = torch.where(higher == -torch.inf, 0.0, higher)
        gaps = chunk - safe[:, None]
        weights = gaps.exp()
        fall = torch.where(best == -torch.inf, 0.0, best - safe)
        shrink = torch.where(best == -torch.inf, 0.0, fall.exp())
        spread = (spread + fall * mass) * shrink + weights.mul(gaps.clamp_min_(-200.0)).sum(1)
        mass = mass * shrink + weights.sum(1)
        best = higher
    return best, place, mass, spread


def argmax_rows(x: torch.Tensor) -> torch.Tensor:
    """Lowest id among the largest of each row [R, V] of any float dtype: [R] int64.

    On the CPU numpy's argmax finds it (both promise the first of equals; torch's took 5-30 times as long for 32,000 to
    152,000 ids, and longer still in bfloat16).
    """
    if x.device.type == "cpu":
        return torch.from_numpy(x.float().numpy().argmax(axis=1))
    return x.argmax(dim=1)


def _descending(logits: torch.Tensor) -> torch.Tensor:
    """On the CPU numpy sorts numbers without their ids many times as fast as torch with them."""
    if logits.device.type == "cpu":
        rising = logits.float().neg()
        rising.numpy().sort(axis=1)
        return rising.neg_()
    return logits.float().sort(dim=1, descending=True).values


def _draw_slab(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    stream: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cut: Cut | None,
) -> torch.Tensor:
    """No noise is larger than GUMBEL_BOUND, so an id that far (times the temperature) below what the argmax comes to
    cannot win. Of peaked logits that is most of the vocabulary, and only the few others draw at all."""
    wide = logits.float()
    best = argmax_rows(wide)
    leader = _Leader(best, wide.gather(1, best[:, None])[:, 0] + temperature * gumbel(*stream, best))
    possible = wide >= (leader.height - temperature * GUMBEL_BOUND)[:, None]
    if cut is not None:
        possible &= keep_mask(wide, cut)
    if 8 * int(possible.count_nonzero()) > possible.numel():
        _draw_all(wide if cut is None else wide.masked_fill(~possible, -torch.inf), temperature, stream, leader)
    else:
        row, token = possible.nonzero(as_tuple=True)
        seed, position, sample = (word[row] for word in stream)
        leader.meet(row, token, wide[row, token] + temperature[row] * gumbel(seed, position, sample, token))
    return leader.token


def _draw_all(
    wide: torch.Tensor,
    temperature: torch.Tensor,
    stream: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    leader: _Leader,
) -> None:
    """The draw with random bits for every id, a few columns at a time. Noise is at most -log(u) of its uniform u, so an
    id whose u is beyond exp((logit - leader) / temperature) cannot win: few are left whose noise is computed."""
    step = max(4, DRAW_CHUNK // len(wide) // 4 * 4)
    for start in range(0, wide.shape[1], step):
        chunk = wide[:, start : start + step]
        uniform = uniform_rows(*stream, start, chunk.shape[1])
        slack = 2.0**-20 * leader.height.abs() + 2.0**-12 * temperature  # for what is rounded on either side
        bound = chunk.sub((leader.height - slack)[:, None]).div_(temperature[:, None]).exp_()
        row, column = (uniform <= bound).nonzero(as_tuple=True)
        noise = gumbel_of(uniform[row, column])
        leader.meet(row, column + start, chunk[row, column] + temperature[row] * noise)


class _Leader:
    """The best so far of each row [R]: its id and its logit with noise; of equal ones the lowest id."""

    def __init__(self, token: torch.Tensor, height: torch.Tensor) -> None:
        self.token, self.height = token, height

    def meet(self, row: torch.Tensor, token: torch.Tensor, height: torch.Tensor) -> None:
        """Others, each of some row."""
        highest = self.height.scatter_reduce(0, row, height, "amax")
        beyond = torch.iinfo(torch.int64).max
        first = torch.where(self.height == highest, self.token, beyond)
        winners = torch.where(height == highest[row], token, beyond)
        self.token, self.height = first.scatter_reduce_(0, row, winners, "amin"), highest


def _check_logits(op: str, logits: torch.Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{op}: logits must be [rows, vocabulary] with a vocabulary, got {tuple(logits.shape)}")


def _check_rows(op: str, logits: torch.Tensor, **columns: torch.Tensor) -> None:
    for name, column in columns.items():
        if column.shape != logits.shape[:1]:
            raise ValueError(
                f"{op}: {name} needs one value per row, {logits.shape[0]} in all, got {tuple(column.shape)}"
            )
