from __future__ import annotations

import harness
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_rlhf.objectives import adapt_kl_coef, kl_estimate

VOCABULARY = 5
logits = harness.numbers(VOCABULARY, bound=2.0).map(lambda x: torch.tensor(x, dtype=torch.float64))


def expectation(estimator: str, policy: Tensor, reference: Tensor) -> Tensor:
    """E_π of the estimate, each token of the vocabulary drawn with its probability; the draw itself has no gradient."""
    logprobs = policy.log_softmax(0)
    return (logprobs.exp().detach() * kl_estimate(logprobs, reference.log_softmax(0), estimator)).sum()


def exact(p: Tensor, q: Tensor) -> float:
    return oracles.exact_kl(oracles.softmax(p.tolist()), oracles.softmax(q.tolist()))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@harness.FEW
@given(policy=logits, reference=logits)
def test_estimate_is_unbiased_for_policy_against_reference(estimator: str, policy: Tensor, reference: Tensor) -> None:
    """Exact enumeration; the swapped direction is a different number."""
    torch.testing.assert_close(
        expectation(estimator, policy, reference).item(), exact(policy, reference), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_direction_is_policy_to_reference(estimator: str) -> None:
    """A case where the two directions are .4 apart, and swapped arguments a third number."""
    policy, reference = torch.tensor([4.0, 0, 0, 0, 0]), torch.zeros(5)
    assert expectation(estimator, policy, reference).item() == pytest.approx(exact(policy, reference), rel=1e-5)
    assert abs(exact(policy, reference) - exact(reference, policy)) > 0.3


@harness.FEW
@given(policy=logits, reference=logits)
def test_gradients_are_those_the_docstring_names(policy: Tensor, reference: Tensor) -> None:
    """k1: none. k2: of KL(policy to reference). k3: of KL(reference to policy)."""
    policy = policy.requires_grad_()
    p, q = policy.log_softmax(0), reference.log_softmax(0)
    forward = torch.autograd.grad((p.exp() * (p - q)).sum(), policy, retain_graph=True)[0]
    reverse = torch.autograd.grad((q.exp() * (q - p)).sum(), policy)[0]
    for estimator, expected in (("k1", torch.zeros_like(p)), ("k2", forward), ("k3", reverse)):
        actual = torch.autograd.grad(expectation(estimator, policy, reference), policy)[0]
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-7, atol=1e-9)


@harness.FEW
@given(harness.numbers(2))
def test_k2_and_k3_are_never_negative(pair: list[float]) -> None:
    for dtype in (torch.float32, torch.float64):
        logprobs, ref_logprobs = torch.tensor(pair, dtype=dtype)
        for estimator in ("k2", "k3"):
            assert kl_estimate(logprobs, ref_logprobs, estimator) >= 0


@pytest.mark.parametrize("gap", [1e-3, -1e-3, 1e-4, -1e-4])
def test_k3_keeps_its_digits_near_zero(gap: float) -> None:
    """In float32 exp(d) - 1 - d loses them all; half the square is what is left of the series."""
    k3 = kl_estimate(torch.tensor(0.0), torch.tensor(gap), "k3").item()
    assert k3 == pytest.approx(gap**2 / 2, rel=2e-3)


def test_hand_values() -> None:
    logprobs, ref_logprobs = torch.tensor([-1.0, -3.0]), torch.tensor([-3.0, -1.0])
    for estimator, expected in (("k1", [2, -2]), ("k2", [2, 2]), ("k3", [1.1353353, 4.3890561])):
        torch.testing.assert_close(
            kl_estimate(logprobs, ref_logprobs, estimator), torch.tensor(expected, dtype=torch.float32)
        )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_of_a_policy_with_itself_is_exactly_zero(estimator: str) -> None:
    logprobs = torch.randn(3, 4)
    assert (kl_estimate(logprobs, logprobs.clone(), estimator) == 0).all()


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="estimator is 'kl'; expected 'k1', 'k2' or 'k3'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "kl")


def test_kl_coefficient_hand_values() -> None:
    """Twice the target is an error of 1, taken as .2; no KL is one of -1, taken as -.2; between them it is itself."""
    settings = {"target": 6.0, "horizon": 10_000, "samples": 512}
    assert adapt_kl_coef(0.15, 12.0, **settings) == pytest.approx(0.15 * (1 + 0.2 * 512 / 10_000))
    assert adapt_kl_coef(0.15, 0.0, **settings) == pytest.approx(0.15 * (1 - 0.2 * 512 / 10_000))
    assert adapt_kl_coef(0.15, 6.6, **settings) == pytest.approx(0.15 * (1 + 0.1 * 512 / 10_000))
    assert adapt_kl_coef(0.15, 6.0, **settings) == 0.15


@harness.FEW
@given(kls=st.lists(st.floats(-3, 20), min_size=1, max_size=6), target=st.floats(0.1, 10))
def test_kl_coefficient_follows_the_recursion(kls: list[float], target: float) -> None:
    coef, out = 0.1, []
    for kl in kls:
        coef = adapt_kl_coef(coef, kl, target=target, horizon=300.0, samples=64)
        out.append(coef)
    assert out == pytest.approx(oracles.adaptive_kl(0.1, kls, target, 300.0, 64))
