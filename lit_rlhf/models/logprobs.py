"""Log-probability of a token from the hidden state that predicts it, without the logits of a whole batch in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# So many logits are made once, and become their own gradient in place (256 MB in float32); more are made twice.
KEPT_LOGITS = 2**26
CHUNK_LOGITS = 2**25
# On a CPU the softmax of this many at a time stays in the core's cache; a GPU takes a whole chunk.
CACHED_LOGITS = 2**18


class AfterHead(NamedTuple):
    """What a model makes of its head's product: logits = cap·tanh(scale·product / cap); without cap, scale·product."""

    scale: float = 1.0
    cap: float | None = None


class Chosen(NamedTuple):
    """What distributions say of the tokens that were chosen; what was not asked for is an empty tensor."""

    logprobs: Tensor  # [N] float32, log π(target)
    entropy: Tensor  # [N] float32, in nats
    correct: Tensor  # [N] bool, True = the target is the likeliest token
    hidden: Tensor | None = None  # [N, d] that the head read


class _Asked(NamedTuple):
    after: AfterHead
    temperature: float
    entropy: bool
    correct: bool
    gradient: bool

    def shape_(self, product: Tensor) -> Tensor:
        """Turn the head's product into logits / temperature, in place."""
        scale, cap = self.after
        if cap is not None:
            return product.mul_(scale / cap).tanh_().mul_(cap / self.temperature)
        return product if scale == self.temperature else product.mul_(scale / self.temperature)

    def slope(self, shaped: Tensor) -> Tensor | None:
        """Derivative of `shape_` where it gave ``shaped``, but for its constant factor; None = 1 everywhere."""
        cap = self.after.cap
        return None if cap is None else shaped.mul(self.temperature / cap).square_().neg_().add_(1)


def chosen_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    after: AfterHead | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    correct: bool = False,
) -> Chosen:
    """Compute log softmax(logits / temperature)[target], logits = after(hidden·weightᵀ + bias), with its gradient.

    Products run in the inputs' dtype or autocast's, forward and backward; the rest, and the sum of the weight's
    gradient, in float32 (float64 for float64). Whether a gradient is wanted changes no bit of the result.

    Args:
        hidden: [N, d] what the head reads.
        weight: [V, d] the head's.
        bias: [V] or None.
        targets: [N] token ids.
        after: what the model makes of the product; None = nothing.
        temperature: divides the logits.
        entropy: also give the entropies, which have their gradient too.
        correct: also say where the target is the likeliest token.
    """
    gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    asked = _Asked(after or AfterHead(), float(temperature), entropy, correct, gradient)
    return Chosen(*_ChosenFromHidden.apply(hidden, weight, bias, targets, asked))


def chosen_from_logits(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False, correct: bool = False
) -> Chosen:
    """Compute the same from logits [N, V] that are there already."""
    log_p = (logits.to(_at_least_float32(logits.dtype)) / temperature).log_softmax(dim=-1)
    nothing = log_p.detach().new_empty(0)
    return Chosen(
        log_p.gather(1, targets[:, None]).squeeze(1),
        _entropy(log_p) if entropy else nothing,
        logits.detach().argmax(dim=-1) == targets if correct else nothing.bool(),
    )


def _entropy(log_p: Tensor) -> Tensor:
    p = log_p.exp()
    return -(p * torch.where(p > 0, log_p, 0.0)).sum(dim=-1)  # a token that cannot occur (logit −∞) adds nothing


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _products(hidden: Tensor, weight: Tensor, bias: Tensor | None, low: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of rows and their product with the head, all in one buffer: fresh memory costs a CPU a third of a product.

    The chunks are the same with and without gradient, and so are the bits of the products.
    """
    rows, vocabulary = len(hidden), len(weight)
    step = rows if rows * vocabulary <= KEPT_LOGITS else max(1, CHUNK_LOGITS // vocabulary)
    buffer = hidden.new_empty(step, vocabulary, dtype=low)
    x, w, b = hidden.to(low), weight.to(low).t(), None if bias is None else bias.to(low)
    for start in range(0, max(rows, 1), max(step, 1)):  # no rows: one chunk of none, so that gradients are 0
        chunk = slice(start, min(start + step, rows))
        out = buffer[: chunk.stop - start]
        yield chunk, torch.mm(x[chunk], w, out=out) if b is None else torch.addmm(b, x[chunk], w, out=out)


def _blocks(chunk: slice, product: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows that are worked on at once, and their part of the chunk's product."""
    rows, vocabulary = product.shape
    step = max(1, CACHED_LOGITS // vocabulary) if product.device.type == "cpu" else rows
    for start in range(0, rows, max(step, 1)):
        part = product[start : start + step]
        yield slice(chunk.start + start, chunk.start + start + len(part)), part


def _minus_target_(p: Tensor, target: Tensor) -> Tensor:
    return p.scatter_add_(1, target, p.new_full((1, 1), -1.0).expand_as(target))


def _gradient_(shaped: Tensor, target: Tensor, asked: _Asked, of_logprob: Tensor, of_entropy: Tensor | None) -> Tensor:
    """Overwrite logits / temperature [n, V] by the gradient of the head's product, but for `shape_`'s factor.

    With p = softmax: ∂ log p_target / ∂ logit_i = 1[i = target] − p_i, ∂H / ∂ logit_i = −p_i·(log p_i + H).
    """
    slope, log_p = asked.slope(shaped), shaped.log_softmax(dim=-1)
    p = torch.exp(log_p, out=shaped)
    if of_entropy is None:
        gradient = _minus_target_(p, target).mul_(-of_logprob)
    else:
        surprise = torch.where(p > 0, log_p, 0.0)
        surprise -= (p * surprise).sum(dim=-1, keepdim=True)  # log p + H
        by_entropy = surprise.mul_(p).mul_(-of_entropy)
        gradient = _minus_target_(p, target).mul_(-of_logprob).add_(by_entropy)
    return gradient if slope is None else gradient.mul_(slope)


class _ChosenFromHidden(torch.autograd.Function):
    """`chosen_from_hidden`, chunk by chunk.

    Where all logits may be kept and only log-probabilities are asked for, the forward pass leaves softmax − 1[target]
    in place of the logits. The gradient is that times one number a row, which is multiplied into the small side of
    the two products: the backward pass does nothing else of the vocabulary's size.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, asked: _Asked
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, low = len(hidden), _product_dtype(hidden)
        high = _at_least_float32(low)
        keep = asked.gradient and not asked.entropy and rows * len(weight) <= KEPT_LOGITS
        logprobs = hidden.new_empty(rows, dtype=high)
        entropy = hidden.new_empty(rows if asked.entropy else 0, dtype=high)
        correct = hidden.new_empty(rows if asked.correct else 0, dtype=torch.bool)
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk, product in _products(hidden, weight, bias, low):
                for at, part in _blocks(chunk, product):
                    target, shaped = targets[at, None], asked.shape_(part.to(high))
                    log_p = shaped.log_softmax(dim=-1)
                    logprobs[at] = log_p.gather(1, target).squeeze(1)
                    if asked.correct:
                        correct[at] = shaped.max(dim=-1).indices == target.squeeze(1)
                    if asked.entropy:
                        entropy[at] = _entropy(log_p)
                    if keep:
                        slope = asked.slope(shaped)
                        gradient = _minus_target_(torch.exp(log_p, out=shaped), target)
                        part.copy_(gradient if slope is None else gradient.mul_(slope))
                kept = product if keep else None
        if asked.gradient:  # there is one chunk where it is kept
            ctx.save_for_backward(hidden, weight, bias, targets, kept)
            ctx.asked, ctx.low = asked, low
        ctx.mark_non_differentiable(*([correct] if asked.entropy else [entropy, correct]))
        return logprobs, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor, of_entropy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, kept = ctx.saved_tensors
        asked, low = ctx.asked, ctx.low
        high, factor = _at_least_float32(low), asked.after.scale / asked.temperature
        sums = _Sums((hidden, weight, bias), low, ctx.needs_input_grad)
        with torch.autocast(hidden.device.type, enabled=False):
            if kept is not None:
                sums.add(slice(0, len(hidden)), kept, of_logprobs[:, None] * -factor)
                return *sums.totals(), None, None
            for chunk, product in _products(hidden, weight, bias, low):
                for at, part in _blocks(chunk, product):
                    of_h = of_entropy[at, None] if asked.entropy else None
                    x, target, of_l = asked.shape_(part.to(high)), targets[at, None], of_logprobs[at, None]
                    part.copy_(_gradient_(x, target, asked, of_l, of_h))
                sums.add(chunk, product, hidden.new_full((1, 1), factor, dtype=high))
        return *sums.totals(), None, None


class _Sums:
    """The gradients of hidden states, weight and bias, as far as they are wanted, added up chunk by chunk."""

    def __init__(self, of: tuple[Tensor, Tensor, Tensor | None], low: torch.dtype, wanted: tuple[bool, ...]) -> None:
        self.hidden, self.weight, self.bias = of
        self.low, self.high, self.wanted = low, _at_least_float32(low), wanted
        self.of_hidden = torch.empty_like(self.hidden) if wanted[0] else None
        self.of_weight: Tensor | None = None
        self.of_bias: Tensor | None = None
        self.w = self.weight.to(low)

    def add(self, chunk: slice, matrix: Tensor, per_row: Tensor) -> None:
        """Add the part of rows whose product has the gradient ``matrix · per_row``."""
        if self.of_hidden is not None:
            self.of_hidden[chunk] = ((matrix @ self.w).to(self.high) * per_row).to(self.hidden.dtype)
        if self.wanted[1]:
            x = (self.hidden[chunk].to(self.high) * per_row).to(self.low)
            if self.of_weight is None:
                self.of_weight = (matrix.t() @ x).to(self.high)
            elif self.low == self.high:
                self.of_weight.addmm_(matrix.t(), x)
            else:
                self.of_weight += matrix.t() @ x
        if self.bias is not None and self.wanted[2]:
            part = (matrix.t() @ per_row.expand(len(matrix), 1).to(self.low)).to(self.high)
            self.of_bias = part if self.of_bias is None else self.of_bias + part

    def totals(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three gradients, in the dtypes of what they belong to."""
        of_weight = None if self.of_weight is None else self.of_weight.to(self.weight.dtype)
        of_bias = None if self.bias is None or self.of_bias is None else self.of_bias.squeeze(1).to(self.bias.dtype)
        return self.of_hidden, of_weight, of_bias
