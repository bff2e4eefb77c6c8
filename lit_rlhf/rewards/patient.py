"""A time limit and further tries for a reward that may hang or fail now and then."""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

from lit_rlhf.rewards.protocol import Reward, RewardError, RowError, reward_name
from lit_rlhf.rewards.waiting import GaveUpError, patiently


def check_patience(owner: str, seconds: float, retries: int, pause: float) -> None:
    """Refuse limits that mean nothing.

    Raises:
        ValueError: no time at all, or a negative number of retries or seconds.
    """
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{owner}: seconds is {seconds}, expected a number above 0")
    if retries < 0:
        raise ValueError(f"{owner}: retries is {retries}, expected 0 or more")
    if not 0 <= pause < float("inf"):
        raise ValueError(f"{owner}: pause is {pause}, expected 0 or more seconds")


class Patient:
    """Wrap a reward: each call has a time limit, and one that fails or hangs is tried again.

    It works for plain functions and for ``async def``, and runs beside the other asynchronous rewards. Tries run in
    threads; one that hangs is left behind and does not keep the run from ending. A ``RowError`` or ``RewardError`` of
    the reward is about its input and is not tried again.

    Args:
        reward: the reward to wrap; a reward model in this process (``score_rollout``) needs none.
        seconds: wall-clock limit of one try.
        retries: further tries after the first.
        pause: seconds before the first retry; twice as long before each further one.

    Raises:
        ValueError: a limit out of its range, or a reward that reads the rollout itself.
    """

    def __init__(self, reward: Reward, seconds: float = 60.0, retries: int = 2, pause: float = 1.0) -> None:
        check_patience("Patient", seconds, retries, pause)
        if hasattr(reward, "score_rollout") or not callable(reward) or isinstance(reward, type):
            raise ValueError(f"Patient wraps functions f(prompts, completions, **columns), not {reward!r}")
        self.reward, self.seconds, self.retries, self.pause = reward, seconds, retries, pause
        self.name = reward_name(reward)
        with contextlib.suppress(TypeError, ValueError):  # some builtins have no signature
            self.__signature__ = inspect.signature(reward)  # so that it is given the columns that the reward names

    def bind(self, tokenizer: Any) -> None:
        """Pass the policy's tokenizer on, if the reward asks for it."""
        if hasattr(self.reward, "bind"):
            self.reward.bind(tokenizer)

    async def __call__(self, **arguments: Any) -> Any:
        """What the reward returns.

        Raises:
            RewardError: it failed or hung at every try; the message says how long and how often.
        """
        try:
            return await patiently(
                functools.partial(self.reward, **arguments),
                seconds=self.seconds,
                retries=self.retries,
                pause=self.pause,
                worth_a_retry=lambda error: not isinstance(error, (RowError, RewardError)),
            )
        except GaveUpError as error:
            raise RewardError(f"reward {self.name!r} {error}") from error.__cause__
