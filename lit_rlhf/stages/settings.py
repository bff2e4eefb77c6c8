"""Groups of knobs that PPO and GRPO share: what holds the policy back, and what its advantages are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_rlhf.objectives import Baseline, KLEstimator, RatioLevel, Scale, WeightBound, WeightLevel
from lit_rlhf.ranges import check_number


@dataclass
class KL:
    """The price of leaving the reference.

    Args:
        coef: β (the first one, where it adapts); at 0 without a target no reference is loaded.
        estimator: of KL(π‖π_ref) from the sampled tokens. k1 is unbiased, its gradient as a loss has mean 0; k2 is
            biased, its gradient is that of KL(π‖π_ref); k3 is unbiased and never negative, its gradient is that of
            KL(π_ref‖π).
        place: in each token's ``reward`` (Stiennon et al. 2020), in the response's ``score`` as one sum (Ahmadian et
            al. 2024), or in the ``loss`` (Shao et al. 2024), where it is differentiated.
        target: nats a response that β is steered to (Ziegler et al. 2019, §2.2); β stays fixed if null.
        horizon: responses over which β adapts.
    """

    coef: float = 0.05
    estimator: KLEstimator = "k1"
    place: Literal["reward", "score", "loss"] = "reward"
    target: float | None = None
    horizon: int = 10_000

    def __post_init__(self) -> None:
        check_number("kl.coef", self.coef, least=0)
        check_number("kl.target", self.target, above=0, null=True)
        check_number("kl.horizon", self.horizon, least=1)

    @property
    def needs_reference(self) -> bool:
        """Whether anything depends on the reference."""
        return self.coef > 0 or self.target is not None


@dataclass
class Clip:
    """How far one rollout may move the policy.

    Args:
        low: ε below 1, where the probability ratio stops paying off; unbounded if null.
        high: ε above 1; larger than ``low``: clip-higher (Yu et al. 2025, DAPO). Unbounded if null.
        ratio: each ``token`` has its own ratio, or all tokens of a ``sequence`` share one (Zheng et al. 2025, GSPO).
        dual: c > 1, largest ratio of a token with a negative advantage (Ye et al. 2020); no cap if null.
        form: ``clip`` takes the worse of ratio and clipped ratio (Schulman et al. 2017, eq. 7); ``truncate`` weighs
            log π by the truncated ratio, a constant (MiniMax 2025, CISPO); ``penalty`` takes off a KL to the old policy
            instead (Schulman et al. 2017, eq. 8).
        penalty: β of the form ``penalty`` (the first one, where it adapts).
        penalty_target: nats a token; β doubles above 1.5 of it and halves below 1 / 1.5; fixed if null.
    """

    low: float | None = 0.2
    high: float | None = 0.2
    ratio: RatioLevel = "token"
    dual: float | None = None
    form: Literal["clip", "truncate", "penalty"] = "clip"
    penalty: float = 1.0
    penalty_target: float | None = None

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            check_number(f"clip.{name}", getattr(self, name), least=0, null=True)
        check_number("clip.dual", self.dual, above=1, null=True)
        check_number("clip.penalty", self.penalty, least=0)
        check_number("clip.penalty_target", self.penalty_target, above=0, null=True)
        if self.form != "clip" and (self.ratio != "token" or self.dual is not None):
            raise ValueError(f"clip.ratio={self.ratio!r} and clip.dual={self.dual} go with clip.form='clip' only")
        if self.form == "truncate" and self.high is None:
            raise ValueError("clip.form='truncate' needs clip.high: where the ratio is truncated, above 1")


@dataclass
class Entropy:
    """A bonus for being undecided.

    Args:
        coef: weight of the entropy in the loss (at the start, where it changes).
        final: weight at the end of the run, reached in a straight line; stays if null.
    """

    coef: float = 0.0
    final: float | None = None

    def __post_init__(self) -> None:
        check_number("entropy.coef", self.coef)
        check_number("entropy.final", self.final, null=True)

    @property
    def counts(self) -> bool:
        """Whether there ever is a bonus."""
        return self.coef != 0 or bool(self.final)


@dataclass
class Correction:
    """What is done where the sampler's probabilities are not the trainer's (another engine, older weights).

    Args:
        level: each ``token`` has its own importance weight, or all tokens of a ``sequence`` share one.
        how: ``truncate`` weights into [low, high], or ``mask`` out what lies beyond.
        low: smallest weight; none if null.
        high: largest weight.
    """

    level: WeightLevel = "token"
    how: WeightBound = "truncate"
    low: float | None = None
    high: float = 2.0

    def __post_init__(self) -> None:
        check_number("correction.high", self.high, above=0)
        check_number("correction.low", self.low, least=0, most=self.high, null=True)


@dataclass
class Advantages:
    """How scores become advantages where there is no critic.

    Args:
        baseline: what a score is compared with: the mean of its ``group`` (GRPO), of the group's others
            (``leave_one_out``, RLOO), of the ``batch`` (REINFORCE), or ``none``.
        scale: divide by the standard deviation of the group or the batch, or not at all (Dr. GRPO).
        whiten: then give the tokens of the whole batch mean 0 and variance 1 (Hu et al. 2025, REINFORCE++).
        mix: several rewards are summed, then compared; or each is compared within its group first
            (``normalize_then_sum``, GDPO).
    """

    baseline: Baseline = "group"
    scale: Scale = "group"
    whiten: bool = False
    mix: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"

    def __post_init__(self) -> None:
        if self.mix == "normalize_then_sum" and (self.baseline, self.scale) != ("group", "group"):
            raise ValueError(
                "advantages.mix='normalize_then_sum' compares each reward within its group: leave baseline and scale "
                "at 'group'"
            )


@dataclass
class Value:
    """How the critic learns.

    Args:
        coef: weight of the value loss.
        clip: how far values may move from the old ones; unclipped if null.
        lr: learning rate; the policy's if null.
        shared: the critic is a head on the policy's own trunk, read in the same pass; else a network of its own.
        adapter: the critic is low-rank adapters and a head of its own on the policy's base weights, which are held
            once for both; goes with ``network.lora``. ``critic`` may then name a reward model's adapter folder.
        warmup: rollouts from which only the critic learns, before the policy moves.
    """

    coef: float = 0.1
    clip: float | None = 0.2
    lr: float | None = None
    shared: bool = False
    adapter: bool = False
    warmup: int = 0

    def __post_init__(self) -> None:
        check_number("value.coef", self.coef, least=0)
        check_number("value.clip", self.clip, above=0, null=True)
        check_number("value.lr", self.lr, least=0, null=True)
        check_number("value.warmup", self.warmup, least=0, whole=True)
        if self.shared and self.adapter:
            raise ValueError(
                "value.shared makes the critic a head on the policy's own states, value.adapter gives it adapters of "
                "its own: leave out one"
            )


@dataclass
class Updates:
    """How a rollout becomes optimizer steps.

    Args:
        epochs: passes over each rollout.
        minibatches: optimizer steps a pass.
        micro_batch_tokens: tokens of a forward pass, padding included; bounds memory and changes no result. Rows of
            like length are read together. A whole minibatch may be one pass if null.
        target_kl: stop a rollout's updates once a minibatch's approximate KL to the old policy passes this.
        halve_on_oom: where memory runs out in an update, halve ``micro_batch_tokens`` for the rest of the run and make
            the optimizer step again; else stop with an error. On one process and under ddp.
        sampler_gap: the sampler's log-probs serve as the old ones while, on a sample of rows, none differs from the
            trainer's by more than this, in nats; else all rows are read again. 0 reads them always.
    """

    epochs: int = 1
    minibatches: int = 1
    micro_batch_tokens: int | None = 16_384
    target_kl: float | None = None
    halve_on_oom: bool = False
    sampler_gap: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("epochs", "minibatches"):
            check_number(f"updates.{name}", getattr(self, name), least=1, whole=True)
        check_number("updates.micro_batch_tokens", self.micro_batch_tokens, least=1, whole=True, null=True)
        check_number("updates.target_kl", self.target_kl, above=0, null=True)
        check_number("updates.sampler_gap", self.sampler_gap, least=0)
