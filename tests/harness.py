"""One set of checks that every objective must pass, whatever it computes.

An ``Objective`` wraps a function as ``call(tensors, mask)``. Its tensors are [B, T] (kind "token"), [B] ("row") or
[B, 5] ("logits"); rows come in units (the responses of one prompt) that may be moved about but not torn apart.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

FEW = settings(max_examples=25, deadline=None, database=None, derandomize=True)
SIZES = {"token": (6, 5), "row": (6,), "logits": (6, 5)}
F, T = False, True
MASK = torch.tensor(
    [[T, T, T, T, T], [T, T, F, F, F], [T, F, F, F, F], [T, T, T, T, F], [T, T, F, T, F], [F, F, T, T, T]]
)
GARBAGE = (float("nan"), float("inf"), -float("inf"), 1e30)


@dataclass(frozen=True)
class Objective:
    """A function under test and what may be asked of it."""

    name: str
    call: Callable[[list[Tensor], Tensor], Tensor]
    kinds: tuple[str, ...]  # of each tensor: "token", "row", "logits"
    gives: str  # "token" [B, T] | "rows" any number of entries a unit | "scalar"
    unit: int = 1  # rows that belong together
    coupled: bool = False  # rows of the whole batch see each other: parts do not add up to the whole
    differentiable: bool = True
    stops_gradient: bool = False  # in part of it: autograd and finite differences need not agree

    def __str__(self) -> str:
        return self.name


def draw(objective: Objective, dtype: torch.dtype = torch.float64, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Fresh leaf tensors for an objective."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(SIZES[kind], generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for kind in objective.kinds
    ]


def run(objective: Objective, tensors: list[Tensor], mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, and the gradient of a fixed uneven sum of it with respect to every tensor (zeros for what has none)."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = objective.call(leaves, mask)
    if not objective.differentiable:
        assert not out.requires_grad
        return out, []
    weights = torch.arange(1, out.numel() + 1, dtype=out.dtype).reshape(out.shape) / 7
    grads = torch.autograd.grad((out * weights).sum(), leaves, materialize_grads=True)
    return out.detach(), list(grads)


def _same(actual: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def check_garbage(objective: Objective) -> None:
    """What stands where nothing counts changes neither values nor gradients, and gets neither."""
    clean, clean_grads = run(objective, draw(objective), MASK)
    for garbage in GARBAGE:
        dirty = [
            torch.where(MASK, tensor, garbage) if kind == "token" else tensor
            for kind, tensor in zip(objective.kinds, draw(objective), strict=True)
        ]
        out, grads = run(objective, dirty, MASK)
        _same([out, *grads], [clean, *clean_grads])
        per_token = [g for kind, g in zip(objective.kinds, grads, strict=False) if kind == "token"]
        for tensor in [out, *per_token] if objective.gives == "token" else per_token:
            assert (tensor[~MASK] == 0).all()


def check_extra_padding(objective: Objective) -> None:
    """Columns that nobody uses, left or right, change nothing."""
    tensors = draw(objective)
    expected, expected_grads = run(objective, tensors, MASK)
    for left, right in ((0, 3), (2, 0), (1, 1)):

        def pad(x: Tensor, value: float, sides: tuple[int, int] = (left, right)) -> Tensor:
            return torch.nn.functional.pad(x, sides, value=value)

        token = [kind == "token" for kind in objective.kinds]
        wide = [pad(t.detach(), torch.nan) if is_token else t for is_token, t in zip(token, tensors, strict=True)]
        out, grads = run(objective, wide, pad(MASK, False))
        if objective.gives == "token":
            assert (out[:, :left] == 0).all()
            assert (out[:, left + MASK.shape[1] :] == 0).all()
            _same([out[:, left : left + MASK.shape[1]]], [expected])
        else:
            _same([out], [expected])
            cut = slice(left, left + MASK.shape[1])
            _same([g[:, cut] if t else g for t, g in zip(token, grads, strict=False)], expected_grads)


def _units(x: Tensor, objective: Objective) -> Tensor:
    return x.reshape(SIZES["row"][0] // objective.unit, -1)


def check_permutation(objective: Objective) -> None:
    """Units of rows in another order give the same results in that order; a scalar stays."""
    order = torch.tensor([4, 2, 0, 5, 1, 3] if objective.unit == 1 else [1, 0] if objective.unit == 3 else [2, 0, 1])
    rows = torch.arange(SIZES["row"][0]).reshape(-1, objective.unit)[order].reshape(-1)
    tensors = draw(objective)
    expected, expected_grads = run(objective, tensors, MASK)
    out, grads = run(objective, [tensor[rows] for tensor in tensors], MASK[rows])
    if objective.gives == "scalar":
        _same([out, *grads], [expected, *(g[rows] for g in expected_grads)])
    else:
        _same([_units(out, objective)], [_units(expected, objective)[order]])


def check_split(objective: Objective) -> None:
    """Rows taken in parts give what they give together."""
    tensors = draw(objective)
    expected, _ = run(objective, tensors, MASK)
    parts = []
    for rows in torch.arange(SIZES["row"][0]).split([objective.unit, SIZES["row"][0] - objective.unit]):
        parts.append(run(objective, [tensor[rows] for tensor in tensors], MASK[rows])[0])
    _same([sum(parts[1:], parts[0]) if objective.gives == "scalar" else torch.cat(parts)], [expected])


def check_gradients(objective: Objective) -> None:
    """Autograd agrees with finite differences."""
    assert torch.autograd.gradcheck(lambda *tensors: objective.call(list(tensors), MASK), draw(objective))


def check_bfloat16(objective: Objective) -> None:
    """Half precision in, finite half precision out, gradients too."""
    out, grads = run(objective, draw(objective, torch.bfloat16), MASK)
    assert out.dtype == torch.bfloat16
    assert all(tensor.isfinite().all() for tensor in [out, *grads])


def check_extremes(objective: Objective) -> None:
    """Inputs of ±10 000 or so, all equal ones and zeros give finite results and gradients."""
    for tensors in (
        draw(objective, torch.float32, scale=1e4),
        draw(objective, torch.float32, scale=1e4, seed=1),
        [torch.full(SIZES[kind], 1e4) for kind in objective.kinds],
        [torch.zeros(SIZES[kind]) for kind in objective.kinds],
    ):
        out, grads = run(objective, tensors, MASK)
        assert all(tensor.isfinite().all() for tensor in [out, *grads])


def check_nothing_counts(objective: Objective) -> None:
    """A row without a counted token gives 0 and no gradient, and so does a batch of such rows; the others go on."""
    dirty = [
        torch.full_like(tensor, torch.nan) if kind == "token" else tensor
        for kind, tensor in zip(objective.kinds, draw(objective), strict=True)
    ]
    out, grads = run(objective, dirty, torch.zeros_like(MASK))
    assert all((tensor == 0).all() for tensor in [out, *grads])

    tensors, one_less = draw(objective), MASK.clone()
    one_less[3] = False
    out, grads = run(objective, tensors, one_less)
    assert all(tensor.isfinite().all() for tensor in [out, *grads])
    assert all((g[3] == 0).all() for g in grads)
    if objective.gives == "token":
        assert (out[3] == 0).all()
        if not objective.coupled:
            _same([out[:3]], [run(objective, [tensor[:3] for tensor in tensors], MASK[:3])[0]])


def on_two_ranks(call: Callable[[Any, Callable[[Tensor], Tensor]], Tensor], parts: Sequence[Any]) -> list[Tensor]:
    """What ``call(part, over_ranks)`` gives on each of two processes: threads that wait for each other to add up."""
    barrier, slots = threading.Barrier(2, timeout=10), [torch.empty(0)] * 2

    def work(rank: int) -> Tensor:
        def add(x: Tensor) -> Tensor:
            slots[rank] = x
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        return call(parts[rank], add)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, range(2)))


MASKED = (check_garbage, check_extra_padding, check_nothing_counts)
ALWAYS = (check_permutation, check_bfloat16, check_extremes)


def numbers(count: int, bound: float = 8.0) -> st.SearchStrategy[list[float]]:
    """Lists of ``count`` plain floats."""
    return st.lists(st.floats(-bound, bound, width=32), min_size=count, max_size=count)


@st.composite
def batches(draw_: st.DrawFn, tensors: int = 1, bound: float = 8.0) -> tuple[list[Tensor], Tensor]:
    """``tensors`` float64 tensors [B, T] and a mask of any pattern with at least one counted entry."""
    rows, columns = draw_(st.integers(1, 3)), draw_(st.integers(1, 5))
    shape = (rows, columns)
    bits = draw_(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    bits[draw_(st.integers(0, len(bits) - 1))] = True
    made = [
        torch.tensor(draw_(numbers(rows * columns, bound)), dtype=torch.float64).reshape(shape) for _ in range(tensors)
    ]
    return made, torch.tensor(bits).reshape(shape)
