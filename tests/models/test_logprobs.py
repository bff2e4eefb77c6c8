"""Log-probs from hidden states: the naive numbers and gradients in both regimes, and never the logits of all rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lit_rlhf.models import logprobs as module
from lit_rlhf.models.logprobs import AfterHead, chosen_from_hidden, chosen_from_logits

N, V, D = 11, 31, 8


class Watch(TorchDispatchMode):
    """Keeps the size of every tensor that is made, and the dtypes of all products."""

    def __init__(self):
        super().__init__()
        self.sizes, self.products = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.sizes += [x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(x)]
        if "mm" in func.__name__:
            self.products.append({x.dtype for x in args if torch.is_tensor(x)})
        return out


@pytest.fixture(params=["kept", "chunks"])
def regime(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", 3 * V)
    monkeypatch.setattr(module, "CACHED_LOGITS", 2 * V)
    if request.param == "chunks":
        monkeypatch.setattr(module, "KEPT_LOGITS", 0)
    return request.param


def inputs(dtype=torch.float32, bias=True):
    hidden, weight = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    bias = torch.randn(V, dtype=dtype).requires_grad_() if bias else None
    return hidden.requires_grad_(), weight.requires_grad_(), bias, torch.randint(V, (N,))


def naive(hidden, weight, bias, targets, after, temperature):
    logits = F.linear(hidden, weight, bias) * after.scale
    logits = logits if after.cap is None else torch.tanh(logits / after.cap) * after.cap
    log_p = (logits / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(1, targets[:, None])[:, 0], entropy, logits.argmax(-1) == targets


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 2.0), (3.0, 5.0)])
def test_numbers_and_gradients_are_the_naive_ones(regime, scale, cap):
    for with_bias, with_entropy in itertools.product((False, True), (False, True)):
        hidden, weight, bias, targets = inputs(bias=with_bias)
        after, leaves = AfterHead(scale, cap), [x for x in (hidden, weight, bias) if x is not None]
        found = chosen_from_hidden(
            hidden, weight, bias, targets, after=after, temperature=0.7, entropy=with_entropy, correct=True
        )
        logprobs, entropy, correct = naive(hidden, weight, bias, targets, after, 0.7)
        torch.testing.assert_close(found.logprobs, logprobs, atol=1e-5, rtol=0)
        assert torch.equal(found.correct, correct)
        up, up_entropy = torch.randn(2, N)
        loss, expected = (found.logprobs * up).sum(), (logprobs * up).sum()
        if with_entropy:
            torch.testing.assert_close(found.entropy, entropy, atol=1e-5, rtol=0)
            loss, expected = loss + (found.entropy * up_entropy).sum(), expected + (entropy * up_entropy).sum()
        ours = torch.autograd.grad(loss, leaves, retain_graph=True)
        for one, other in zip(ours, torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        for one, again in zip(ours, torch.autograd.grad(loss, leaves), strict=True):
            assert torch.equal(one, again)  # the backward pass uses nothing up


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_gradcheck(regime, entropy, cap):
    *leaves, targets = inputs(torch.float64)

    def f(*leaves):
        found = chosen_from_hidden(*leaves, targets, after=AfterHead(0.5, cap), temperature=1.3, entropy=entropy)
        return found[:2] if entropy else found.logprobs

    assert torch.autograd.gradcheck(f, leaves)


def test_a_gradient_wanted_or_not_changes_no_bit(regime):
    hidden, weight, bias, targets = inputs()
    with_gradient = chosen_from_hidden(hidden, weight, bias, targets).logprobs
    with torch.no_grad():
        assert torch.equal(chosen_from_hidden(hidden, weight, bias, targets).logprobs, with_gradient)
        assert torch.equal(chosen_from_hidden(hidden, weight, bias, targets, entropy=True).logprobs, with_gradient)


@pytest.mark.parametrize("entropy", [False, True])
def test_under_autocast_products_are_half_and_the_rest_is_not(regime, entropy):
    hidden, weight, bias, targets = inputs()
    logprobs, h, _ = naive(hidden, weight, bias, targets, AfterHead(), 1.0)
    expected = torch.autograd.grad(logprobs.sum() + (h.sum() if entropy else 0), [hidden, weight, bias])
    with Watch() as watch:
        with torch.autocast("cpu", torch.bfloat16):
            found = chosen_from_hidden(hidden, weight, bias, targets, entropy=entropy)
        (found.logprobs.sum() + found.entropy.sum()).backward()  # outside of autocast, as trainers do
    assert all(dtypes == {torch.bfloat16} for dtypes in watch.products)
    assert found.logprobs.dtype == found.entropy.dtype == torch.float32
    torch.testing.assert_close(found.logprobs, logprobs, atol=0.1, rtol=0)
    for leaf, gradient in zip((hidden, weight, bias), expected, strict=True):
        assert leaf.grad.dtype == torch.float32
        torch.testing.assert_close(leaf.grad, gradient, atol=0.15, rtol=0.05)


def test_half_precision_weights_give_float32_numbers_and_gradients_of_their_own_dtype(regime):
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    found = chosen_from_hidden(hidden, weight, bias, targets).logprobs
    expected = chosen_from_logits(F.linear(hidden, weight, bias), targets).logprobs
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    found.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.bfloat16


def test_what_is_frozen_costs_no_product(regime):
    hidden, weight, _, targets = inputs(bias=False)

    def products(*trained):
        for leaf, is_trained in zip((hidden, weight), trained, strict=True):
            leaf.requires_grad_(is_trained)
            leaf.grad = None
        with Watch() as watch:
            found = chosen_from_hidden(hidden, weight, None, targets).logprobs.sum()
            if any(trained):
                found.backward()
        assert (hidden.grad is not None, weight.grad is not None) == trained
        return len(watch.products)

    # Forward; with gradient also the product again where it was not kept, and one for each that is trained.
    chunks, again = (1, 0) if regime == "kept" else (4, 1)
    assert products(True, True) == (3 + again) * chunks
    assert products(True, False) == products(False, True) == (2 + again) * chunks
    assert products(False, False) == chunks


def test_the_logits_of_all_rows_are_never_in_memory(monkeypatch):
    rows, vocabulary = 64, 4096
    monkeypatch.setattr(module, "KEPT_LOGITS", 2**16)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 2**14)
    hidden = torch.randn(rows, D, requires_grad=True)
    weight = torch.randn(vocabulary, D, requires_grad=True)
    with Watch() as watch:
        found = chosen_from_hidden(
            hidden, weight, None, torch.zeros(rows, dtype=torch.long), entropy=True, correct=True
        )
        (found.logprobs.sum() + found.entropy.sum()).backward()
    assert max(watch.sizes) == weight.numel() == rows * vocabulary // 8
    logits = [size for size in watch.sizes if size != weight.numel()]
    assert max(logits) == 2**14


def test_no_rows_give_zero_gradients(regime):
    hidden, weight, bias, targets = inputs()
    chosen_from_hidden(hidden[:0], weight, bias, targets[:0]).logprobs.sum().backward()
    assert all((x.grad == 0).all() for x in (hidden, weight, bias))


def test_impossible_and_extreme_tokens_stay_finite(regime):
    hidden, weight, _, targets = inputs(bias=False)
    bias = torch.zeros(V)
    bias[3], bias[4], targets = -float("inf"), 1e4, targets * 0 + 4
    found = chosen_from_hidden(hidden, weight, bias, targets, entropy=True, correct=True)
    (found.logprobs.sum() + found.entropy.sum()).backward()
    assert found.correct.all()
    assert all(x.isfinite().all() for x in (found.logprobs, found.entropy, hidden.grad, weight.grad))


def test_from_logits_says_the_same():
    hidden, weight, bias, targets = inputs()
    one = chosen_from_hidden(hidden, weight, bias, targets, temperature=0.6, entropy=True, correct=True)
    other = chosen_from_logits(F.linear(hidden, weight, bias), targets, temperature=0.6, entropy=True, correct=True)
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=0)
