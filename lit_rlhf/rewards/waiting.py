"""Waiting for rewards: an event loop in a thread of its own, and calls that are given up on when they take too long."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

import torch


class GaveUpError(RuntimeError):
    """A call failed at every try; the message says how often it was tried and what happened at the last."""


@functools.lru_cache(maxsize=2)
def event_loop(process: int, name: str = "rewards") -> asyncio.AbstractEventLoop:
    """Event loop in a thread of its own, one a process (threads do not survive a fork) and name.

    It outlives the call, so that a client that a reward keeps open stays usable, and it is another thread's, so that
    rewards also run where a loop is running already (a notebook).
    """
    loop = asyncio.new_event_loop()

    def run() -> None:
        torch.set_grad_enabled(False)  # grad mode is a thread's own
        loop.run_forever()

    threading.Thread(target=run, name=f"{name}-{process}", daemon=True).start()
    return loop


async def _outcome(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except BaseException as error:  # SystemExit, too: it would end the loop's thread, and the caller would wait forever
        return error


async def _together(awaitables: list[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*map(_outcome, awaitables))


def wait_for(awaitables: list[Awaitable[Any]]) -> list[Any]:
    """Results, or exceptions, of all awaitables, run concurrently."""
    future = asyncio.run_coroutine_threadsafe(_together(awaitables), event_loop(os.getpid()))
    try:
        return future.result()
    except BaseException:  # Ctrl-C: do not leave requests running behind the user's back
        future.cancel()
        raise


async def patiently(
    work: Callable[[], Any],
    *,
    seconds: float,
    retries: int,
    pause: float,
    worth_a_retry: Callable[[Exception], bool] = lambda error: True,
) -> Any:
    """What ``work()`` returns (what it gives when awaited, if it is asynchronous), however often that takes.

    Each try has a thread of its own, which nobody waits for once its time is up: it cannot be stopped, but it does not
    keep the process from ending either. Asynchronous work shares one event loop and is cancelled.

    Args:
        work: called without arguments, at every try.
        seconds: wall-clock limit of a try.
        retries: further tries after the first.
        pause: seconds before the first retry; twice as long before each further one.
        worth_a_retry: whether an error may be gone at the next try; others are raised at once.

    Raises:
        GaveUpError: the last try, too, failed or took too long.
    """
    for tried in range(1, retries + 2):
        running: list[Future[Any]] = []
        attempt = _in_thread(functools.partial(_resolved, work, running))
        try:
            done, _ = await asyncio.wait({attempt}, timeout=seconds)
        finally:
            for future in running:  # too late, or Ctrl-C
                future.cancel()
        cause: BaseException | None = None
        if done:
            result, cause = attempt.result()
            if cause is None:
                return result
            if not isinstance(cause, Exception) or not worth_a_retry(cause):
                raise cause
        if tried <= retries:
            await asyncio.sleep(pause * 2 ** (tried - 1))
    said = f"no answer within {seconds:g} seconds" if cause is None else f"{type(cause).__name__}: {cause}"
    times = "once, its only try" if not retries else f"{retries + 1} times, of which the last"
    raise GaveUpError(f"failed {times}: {said}") from cause


def _resolved(work: Callable[[], Any], running: list[Future[Any]]) -> Any:
    result = work()
    if not inspect.isawaitable(result):
        return result
    # Not the loop that waits: work that blocks its loop must not stop the clock.
    running.append(asyncio.run_coroutine_threadsafe(_awaited(result), event_loop(os.getpid(), "patience")))
    return running[0].result()


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _in_thread(work: Callable[[], Any]) -> asyncio.Future[tuple[Any, BaseException | None]]:
    """Result and exception of work that runs in a daemon thread, of which one is None."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def settle(outcome: tuple[Any, BaseException | None]) -> None:
        if not future.done():
            future.set_result(outcome)

    def run() -> None:
        torch.set_grad_enabled(False)
        try:
            outcome: tuple[Any, BaseException | None] = work(), None
        except BaseException as error:
            outcome = None, error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=run, name="reward-try", daemon=True).start()
    return future
