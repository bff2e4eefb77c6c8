"""The harness, run on every objective there is."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import harness
import pytest
import torch
from harness import Objective
from torch import Tensor

from lit_rlhf import objectives as o

GROUPS = torch.arange(6) // 3
AGGREGATIONS = {"token_mean": 18.0, "sequence_mean": 6.0, "fixed_length": 30.0}  # with what divides the whole's sum


def per_token(function, *, pick: int | None = 0, **settings):
    """``function(*tensors, mask, **settings)``, the ``pick``-th of what it returns."""

    def call(tensors: list[Tensor], mask: Tensor) -> Tensor:
        out = function(*tensors, mask, **settings)
        return out if pick is None else out[pick]

    return call


def kl(tensors: list[Tensor], mask: Tensor, estimator: str) -> Tensor:
    """As the stages use it: log-probs are 0 where the mask is False, and what comes out is masked."""
    logprobs, ref_logprobs = (torch.where(mask, tensor, 0.0) for tensor in tensors)
    return torch.where(mask, o.kl_estimate(logprobs, ref_logprobs, estimator), 0.0)


def policy(**settings):
    return per_token(o.clipped_policy_loss, **{"clip_low": 0.2, "clip_high": 0.3, **settings})


def steps(tensors: list[Tensor], mask: Tensor, scale: str) -> Tensor:
    """Process supervision where every other column ends a step, if it counts."""
    columns = torch.arange(mask.shape[1]).expand_as(mask)
    ends = torch.where(mask & (mask.cumsum(1) % 2 == 1), columns, -1)
    return o.step_advantages(tensors[0], ends, mask, 3, scale=scale)


def weights(tensors: list[Tensor], mask: Tensor, **settings) -> Tensor:
    return o.importance_weights(*tensors, mask, **{"low": 0.5, "high": 2.0, **settings})[0]


TOKEN = [
    Objective("whiten", per_token(o.masked_whiten, pick=None), ("token",), "token", coupled=True),
    Objective(
        "whiten-keep-mean", per_token(o.masked_whiten, pick=None, center=False), ("token",), "token", coupled=True
    ),
    *(Objective(f"kl-{k}", partial(kl, estimator=k), ("token", "token"), "token") for k in ("k1", "k2", "k3")),
    Objective("token-rewards", per_token(o.token_rewards, pick=None, kl_coef=0.3), ("row", "token"), "token"),
    Objective("gae", per_token(o.generalized_advantages, gamma=0.9, lam=0.8), ("token", "token"), "token"),
    Objective("returns", per_token(o.generalized_advantages, pick=1, gamma=0.9, lam=0.8), ("token", "token"), "token"),
    Objective("rewards-to-go", per_token(o.rewards_to_go, pick=None, gamma=0.9), ("token",), "token"),
    Objective("policy", policy(), ("token",) * 3, "token"),
    Objective("policy-unclipped", policy(clip_low=None, clip_high=None), ("token",) * 3, "token"),
    Objective("policy-dual", policy(dual_clip=3.0), ("token",) * 3, "token"),
    Objective("policy-sequence", policy(ratio="sequence"), ("token",) * 3, "token"),
    Objective("policy-sequence-token", policy(ratio="sequence_token"), ("token",) * 3, "token", stops_gradient=True),
    *(
        Objective(
            f"cispo-{low}",
            per_token(o.truncated_policy_loss, low=low, high=0.3),
            ("token",) * 3,
            "token",
            stops_gradient=True,
        )
        for low in (None, 0.2)
    ),
    Objective("policy-penalized", per_token(o.penalized_policy_loss, kl_penalty=0.7), ("token",) * 3, "token"),
    *(
        Objective(
            f"weights-{level}-{how}",
            partial(weights, level=level, how=how),
            ("token", "token"),
            "token",
            differentiable=False,
        )
        for level in ("token", "sequence")
        for how in ("truncate", "mask")
    ),
    *(
        Objective(f"steps-{s}", partial(steps, scale=s), ("token",), "token", 3, coupled=s == "batch")
        for s in ("group", "batch", "none")
    ),
    Objective("value", per_token(o.clipped_value_loss, clip=0.2), ("token",) * 3, "token"),
    Objective("value-unclipped", per_token(o.clipped_value_loss, clip=None), ("token",) * 3, "token"),
]
SCALAR = [
    *(
        Objective(how, per_token(o.aggregate, pick=None, how=how, denominator=whole), ("token",), "scalar")
        for how, whole in AGGREGATIONS.items()
    ),
    Objective(
        "token_mean-own", per_token(o.aggregate, pick=None, how="token_mean"), ("token",), "scalar", coupled=True
    ),
    Objective(
        "sequence_mean-own", per_token(o.aggregate, pick=None, how="sequence_mean"), ("token",), "scalar", coupled=True
    ),
    Objective("masked-mean", per_token(o.masked_mean, pick=None), ("token",), "scalar", coupled=True),
    Objective("next-token", per_token(o.next_token_loss, pick=None, denominator=18.0), ("token",), "scalar"),
    Objective(
        "explained-variance",
        per_token(o.explained_variance, pick=None),
        ("token", "token"),
        "scalar",
        coupled=True,
        differentiable=False,
    ),
]
ROWS = [
    *(
        Objective(
            f"group-{s}", lambda x, _, s=s: o.group_advantages(x[0], 3, scale=s), ("row",), "rows", 3, s == "batch"
        )
        for s in ("group", "batch", "none")
    ),
    *(
        Objective(
            f"baseline-{b}-{s}",
            lambda x, _, b=b, s=s: o.baseline_advantages(x[0], 3, baseline=b, scale=s),
            ("row",),
            "rows",
            3,
            "batch" in (b, s),
        )
        for b in ("group", "leave_one_out", "batch", "none")
        for s in ("group", "batch", "none")
    ),
    Objective(
        "normalize-then-sum",
        lambda x, _: o.normalize_then_sum(torch.stack(x, 1), x[0].new_tensor([1.0, 2.0]), 3),
        ("row", "row"),
        "rows",
        3,
        True,
    ),
    Objective("leave-one-out", lambda x, _: o.leave_one_out_advantages(x[0], 2), ("row",), "rows", 2),
    Objective("pairwise", lambda x, _: o.pairwise_loss(x[0], x[1], margin=x[2]), ("row",) * 3, "rows"),
    Objective("smoothed", lambda x, _: o.pairwise_loss(x[0], x[1], label_smoothing=0.1), ("row",) * 2, "rows"),
    Objective("best-of-k", lambda x, _: o.best_of_k_loss(x[0], GROUPS[: len(x[0])]), ("row",), "rows", 3),
    Objective("centering", lambda x, _: o.centering_loss(*x), ("row", "row"), "rows"),
    Objective("ranking", lambda x, _: o.ranking_loss(x[0], GROUPS[: len(x[0])]), ("row",), "rows", 3),
    Objective("group-mean", lambda x, _: o.group_mean(x[0], GROUPS[: len(x[0])]), ("row",), "rows", 3),
    Objective("calibration", lambda x, _: o.calibration_error(x[0]), ("row",), "scalar", 1, True, False),
    Objective("reliability", lambda x, _: o.accuracy_by_margin(x[0]).accuracy, ("row",), "scalar", 1, True, False),
    Objective("length", lambda x, _: o.score_length_correlation(*x), ("row", "row"), "scalar", 1, True, False),
    Objective("entropy", lambda x, _: o.entropy_from_logits(x[0]), ("logits",), "rows"),
]
EVERY = TOKEN + SCALAR + ROWS


@pytest.mark.parametrize("check", harness.MASKED, ids=lambda check: check.__name__)
@pytest.mark.parametrize("objective", TOKEN + SCALAR, ids=str)
def test_masked(objective: Objective, check) -> None:
    check(objective)


@pytest.mark.parametrize("check", harness.ALWAYS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_always(objective: Objective, check) -> None:
    check(objective)


@pytest.mark.parametrize("objective", [x for x in EVERY if not x.coupled], ids=str)
def test_parts_make_the_whole(objective: Objective) -> None:
    harness.check_split(objective)


@pytest.mark.parametrize("objective", [x for x in EVERY if x.differentiable and not x.stops_gradient], ids=str)
def test_gradients(objective: Objective) -> None:
    harness.check_gradients(objective)


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("objective", [x for x in TOKEN if x.differentiable and x.unit == 1 and not x.coupled], ids=str)
def test_microbatches_sum_to_the_whole(objective: Objective, how: str) -> None:
    """The loss of a step and its gradient do not depend on the microbatches, given the whole's denominator."""

    def loss(tensors: list[Tensor], mask: Tensor, denominator: float | Tensor | None) -> Tensor:
        return o.aggregate(objective.call(tensors, mask), mask, how, denominator)

    whole = harness.draw(objective)
    expected = loss(whole, harness.MASK, None)
    expected_grads = torch.autograd.grad(expected, whole, materialize_grads=True)
    for size in (1, 2, 3):
        for denominator in (AGGREGATIONS[how], torch.tensor(AGGREGATIONS[how])):
            tensors = harness.draw(objective)
            parts = [
                loss([t[rows] for t in tensors], harness.MASK[rows], denominator)
                for rows in torch.arange(6).split(size)
            ]
            grads = torch.autograd.grad(torch.stack(parts).sum(), tensors, materialize_grads=True)
            torch.testing.assert_close(torch.stack(parts).sum(), expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(grads, expected_grads, rtol=1e-12, atol=1e-12)


def test_every_public_function_is_here() -> None:
    """A function added to the room must be added to the harness too (``adapt_…`` take no tensors)."""
    names = {name for name in o.__all__ if callable(getattr(o, name)) and name[0].islower()}
    names -= {"adapt_kl_coef", "adapt_kl_penalty"}
    source = Path(__file__).read_text()
    assert {name for name in names if f"o.{name}" not in source} == set()
