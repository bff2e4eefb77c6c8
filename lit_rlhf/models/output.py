"""Have a model give log-probabilities of chosen tokens where it would give logits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_rlhf.models.logprobs import AfterHead, Chosen, chosen_from_hidden, chosen_from_logits


def chosen_tokens(
    model: Any,
    ids: Tensor,
    positions: Tensor,
    targets: Tensor,
    *,
    position_ids: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    correct: bool = False,
    hidden: bool = False,
) -> Chosen:
    """Run a model and say how likely ``targets`` are after ``positions``; its head runs at those positions only.

    The model's own forward runs (sharded weights are gathered by its hooks), with a stand-in for the output head. A
    model that does to logits what the stand-in cannot know is run as it is, on logits at every position.

    Args:
        model: a causal language model, possibly in a DistributedDataParallel.
        ids: [B, L] token ids, rows from the left edge.
        positions: [N] long, places in ``ids.flatten()`` whose next token is asked for.
        targets: [N] token ids.
        position_ids: [B, L] where a row holds several sequences: each begins at 0; None = they count along the row.
        temperature: divides the logits.
        entropy: also the entropies.
        correct: also whether the target is the likeliest token.
        hidden: also the states that the head reads there.

    Raises:
        ValueError: ``hidden`` is asked of a model that cannot be run with a stand-in.
    """
    network = model.module if isinstance(model, DistributedDataParallel) else model
    after = after_head(network)
    ask: Any = {"temperature": temperature, "entropy": entropy, "correct": correct}
    inputs = {"input_ids": ids, "use_cache": False} | ({} if position_ids is None else {"position_ids": position_ids})
    if after is None:
        if hidden:
            raise _no_stand_in(network)
        logits = model(**inputs).logits
        return chosen_from_logits(logits.flatten(0, 1).index_select(0, positions), targets, **ask)
    head = network.get_output_embeddings()
    own_forward = head.forward

    def judge(rows: Tensor) -> tuple[Any, ...]:
        found = _judge(head, own_forward, after, rows, targets, **ask)
        return found._replace(hidden=rows) if hidden else found

    return Chosen(*_at_head(model, positions, judge, **inputs))


def _no_stand_in(network: Any) -> ValueError:
    return ValueError(
        f"{type(network).__name__} does more to its logits than to scale and cap them: no head can share it"
    )


def head_inputs(network: Any, positions: Tensor, **inputs: Any) -> Tensor:
    """Run a model and give what its output head would read, [N, d].

    Args:
        network: a causal language model.
        positions: [N] long, places in the flattened inputs.
        inputs: of the model's forward.

    Raises:
        ValueError: the model cannot be run with a stand-in for its head.
    """
    if after_head(network) is None:
        raise _no_stand_in(network)
    (rows,) = _at_head(network, positions, lambda rows: (rows,), **inputs)
    return rows


def chosen_after(
    network: Any, rows: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> Chosen:
    """Say how likely ``targets`` [N] are after the hidden states ``rows`` [N, d] that `head_inputs` gave."""
    head, after = network.get_output_embeddings(), after_head(network)
    assert after is not None
    return _judge(head, head.forward, after, rows, targets=targets, temperature=temperature, entropy=entropy)


def _judge(
    head: Any, own_forward: Callable[[Tensor], Tensor], after: AfterHead, rows: Tensor, targets: Tensor, **ask: Any
) -> Chosen:
    is_linear = getattr(own_forward, "__func__", None) is nn.Linear.forward  # no adapters, quantisation or patches
    if is_linear and type(head.weight.data) is Tensor:  # sharded weights are whole by now
        return chosen_from_hidden(rows, head.weight, head.bias, targets, after=after, **ask)
    return chosen_from_logits(_apply(after, own_forward(rows)), targets, **ask)


def _at_head(
    model: Any, positions: Tensor, reader: Callable[[Tensor], tuple[Any, ...]], **inputs: Any
) -> tuple[Any, ...]:
    """What a reader makes of the hidden states before a model's head, in place of the model's output."""
    network = model.module if isinstance(model, DistributedDataParallel) else model
    head, kept = network.get_output_embeddings(), list[tuple[Any, ...]]()

    def stand_in(hidden: Tensor) -> Tensor:
        kept.append(reader(hidden.flatten(0, 1).index_select(0, positions)))
        return hidden.new_zeros(1, 1, head.out_features)  # the model may cap or scale it

    def hand_over(module: nn.Module, args: Any, output: Any) -> Any:
        return tuple(kept.pop())

    # What is wanted must leave through the forward's output (there the sharded backward hooks in): our hook first.
    handle = network.register_forward_hook(hand_over, prepend=True)
    try:
        with _standing_in(head, stand_in):
            return model(**inputs)
    finally:
        handle.remove()


@contextmanager
def _standing_in(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    before = head.__dict__.get("forward")  # some libraries keep a forward of their own here
    head.forward = forward
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def _apply(after: AfterHead, product: Tensor) -> Tensor:
    product = product.to(torch.promote_types(product.dtype, torch.float32)) * after.scale
    return product if after.cap is None else torch.tanh(product / after.cap) * after.cap


_AFTER_HEAD: WeakKeyDictionary[nn.Module, AfterHead | None] = WeakKeyDictionary()


def after_head(model: Any) -> AfterHead | None:
    """What a model does to its head's product; None = not a scale and a soft-cap. Found out once a model."""
    if model not in _AFTER_HEAD:
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
            _AFTER_HEAD[model] = _probe(model)
        if _AFTER_HEAD[model] is None:
            warnings.warn(
                f"{type(model).__name__} does more to its logits than to scale and cap them: its log-probs are "
                "computed from logits at every position, which is slower and takes more memory",
                stacklevel=4,
            )
    return _AFTER_HEAD[model]


def _probe(model: Any) -> AfterHead | None:
    """Run two tokens through a model whose head answers with known numbers, and see what logits they become.

    So scales (Cohere, Granite, Falcon-H1) and soft-caps (Gemma 2) are read off the model itself, whatever its config
    calls them, and what is neither is seen: other logits than those two would give.
    """
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    seen: list[torch.Size] = []
    try:
        head = model.get_output_embeddings()
        # Float32 even in a bfloat16 model; first two numbers that show the slope at 0 and the far end.
        known = torch.linspace(-200, 200, 2 * head.out_features, device=ids.device)
        known[:2] = known.new_tensor([2.0**-20, 2.0**20])
        known = known.view(1, 2, -1)

        def stand_in(hidden: Tensor) -> Tensor:
            seen.append(hidden.shape[:2])
            return known.clone()

        with _standing_in(head, stand_in):
            logits = model(input_ids=ids, use_cache=False).logits
        near, far = (logits[0, 0, :2] / known[0, 0, :2]).tolist()
    except Exception:  # what breaks on a stand-in may well run as it is, and if not, will say so itself
        return None
    scale = 1.0 if abs(near - 1) < 1e-6 else near
    after = AfterHead(scale, None if abs(far - near) <= 1e-5 * abs(near) else float(logits[0, 0, 1]))
    fits = seen == [ids.shape] and logits.shape == known.shape and logits.dtype == torch.float32
    return after if fits and torch.allclose(_apply(after, known), logits, rtol=1e-5, atol=1e-5) else None
