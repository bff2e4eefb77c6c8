"""Drawing tokens: exact, without a sort, from a random stream that belongs to the row."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rlhf.objectives.likelihood import entropy_from_logits
from lit_rlhf.rollout.sampling import Sampling

_BLOCK = 256  # tokens a block of the two-level draw; near √V for vocabularies of 30,000 to 150,000


def _mix(x: Tensor) -> Tensor:
    """Scramble 64-bit integers, so that neighbours have nothing in common (SplitMix64's output function)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniforms(seed: int, rows: Tensor, steps: int) -> Tensor:
    """Give each row its own stream of random numbers, a pure function of seed, row number and step.

    So a row draws the same tokens whatever batch, process or order it is sampled in.

    Args:
        seed: of the call, 63 bits.
        rows: [B] row numbers.
        steps: T.

    Returns:
        [B, T, 2] float32 in [0, 1), in steps of 2⁻²⁴: one number for the block and one for the token within it.

    Source: SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), by counter.
    """
    golden = -0x61C8864680B583EB
    stream = _mix(torch.tensor(seed, device=rows.device) + golden * (rows.long() + 1))
    counter = torch.arange(1, 2 * steps + 1, device=rows.device)
    bits = _mix(stream[:, None] + golden * counter)
    return (((bits >> 40) & 0xFFFFFF).float() * 2.0**-24).view(len(rows), steps, 2)


def _pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw an index with probability proportional to ``weights`` [B, n], by inverse CDF at ``uniform`` [B]; [B, 1].

    An entry of weight 0 is never drawn: the first sum above the point belongs to an entry that added to it, and the
    point stays below the total even where the product rounds up to it.
    """
    sums = weights.cumsum(dim=-1)
    total = sums[:, -1:]
    point = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(sums, point, right=True).clamp(max=weights.shape[1] - 1)


def _filtered(weights: Tensor, sampling: Sampling) -> Tensor:
    """Set the weights [B, V] of tokens that the settings leave out to 0; the weights sum to anything."""
    if sampling.top_k and sampling.top_k < weights.shape[1]:
        least = weights.topk(sampling.top_k, dim=-1).values[:, -1:]
        weights = weights.masked_fill(weights < least, 0.0)
    if sampling.top_p < 1:
        ordered, order = weights.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # what the likelier tokens hold together
        ordered = ordered.masked_fill(before >= sampling.top_p * ordered.sum(dim=-1, keepdim=True), 0.0)
        weights = torch.zeros_like(weights).scatter(1, order, ordered)
    if sampling.min_p:
        weights = weights.masked_fill(weights < sampling.min_p * weights.amax(dim=-1, keepdim=True), 0.0)
    return weights


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling, banned: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw one token a row from softmax(logits / temperature), exactly, by an inverse CDF on two levels.

    First a block of tokens is drawn by the blocks' sums, then a token within it: two short searches in place of a sort
    or a running sum over the vocabulary.

    Args:
        logits: [B, V].
        uniform: [B, 2] random numbers in [0, 1).
        sampling: temperature and filters; temperature 0 takes the likeliest token.
        banned: [N] ids that may not be drawn now, on the same device: a list would be copied there at every step.

    Returns:
        (token [B], its log-probability [B] in float32). The latter is of the policy's own distribution at the
        temperature (1 where that is 0), before filters and bans.
    """
    rows, vocabulary = logits.shape
    logits = logits.float()
    if sampling.temperature not in (0.0, 1.0):
        logits = logits / sampling.temperature
    top = logits.amax(dim=-1, keepdim=True)
    padded = logits.new_zeros(rows, -(-vocabulary // _BLOCK) * _BLOCK)
    weights = padded[:, :vocabulary]
    torch.sub(logits, top, out=weights).exp_()
    blocks = padded.view(rows, -1, _BLOCK)
    total = blocks.sum(dim=-1).sum(dim=-1)
    if sampling.greedy:
        allowed = logits if banned is None else logits.index_fill(1, banned, -torch.inf)
        token = allowed.argmax(dim=-1, keepdim=True)
    else:
        if banned is not None:
            weights.index_fill_(1, banned, 0.0)
        if sampling.filtered:
            padded[:, :vocabulary] = _filtered(weights, sampling)
        block = _pick(blocks.sum(dim=-1), uniform[:, 0])
        inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1)
        # Among NaN nothing can be found: such a row, which is refused in the end, must still draw a token that exists.
        token = (block * _BLOCK + _pick(inside, uniform[:, 1])).clamp(max=vocabulary - 1)
    logprob = logits.gather(1, token) - top
    return token.squeeze(1), logprob.squeeze(1) - total.log()


def entropy_of(logits: Tensor, sampling: Sampling) -> Tensor:
    """Entropy of the policy's own distribution at the temperature (1 where that is 0), before filters; [B, V] → [B]."""
    return entropy_from_logits(logits.float() / (sampling.temperature or 1.0))


def is_one_of(token: Tensor, ids: Tensor) -> Tensor:
    """Say of each ``token`` [B] whether it is among ``ids`` [N]; unlike ``torch.isin``, it never waits for a GPU."""
    return (token[:, None] == ids).any(dim=1)
