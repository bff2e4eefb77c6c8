"""A reward that hangs or fails: tried again, given up on in time, and never waited for at the end."""

from __future__ import annotations

import asyncio
import copy
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from test_combine import rollout
from test_yaml import parse

from lit_rlhf.rewards import LengthBounds, Patient, RewardError, Rewards, RowError


class Flaky:
    """Fails so many times, then scores; by raising or by hanging."""

    def __init__(self, failures: int, hang: float = 0.0, is_async: bool = False) -> None:
        self.failures, self.hang, self.calls = failures, hang, 0
        self.cancelled = 0
        if is_async:
            self.__class__ = FlakyLater

    def fails(self) -> bool:
        self.calls += 1
        return self.calls <= self.failures

    def __call__(self, completions, answer):
        if self.fails():
            time.sleep(self.hang)
            raise ConnectionError("nobody home")
        return [float(len(text)) for text in completions]


class FlakyLater(Flaky):
    async def __call__(self, completions, answer):
        if self.fails():
            try:
                await asyncio.sleep(self.hang)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            raise ConnectionError("nobody home")
        return [float(len(text)) for text in completions]


BOTH = pytest.mark.parametrize("is_async", [False, True])
ROWS = rollout(answer=("2", "4"), other=("", ""))


@BOTH
@pytest.mark.parametrize("hang", [0.0, 5.0])
def test_a_reward_that_recovers_is_tried_until_it_does(is_async, hang):
    flaky = Flaky(2, hang, is_async)
    started = time.perf_counter()
    scores, parts = Rewards([Patient(flaky, seconds=0.2, retries=2, pause=0.01)])(ROWS)
    assert scores.tolist() == [3.0, 10.0]
    assert time.perf_counter() - started < 2
    assert flaky.calls == 3
    assert list(parts) == [type(flaky).__name__.replace("yL", "y_l").lower()]  # the wrapped reward's own name
    assert flaky.cancelled == (2 if is_async and hang else 0)


@BOTH
def test_one_that_does_not_is_named_with_how_long_and_how_often(is_async):
    for hang, said in ((5.0, "no answer within 0.05 seconds"), (0.0, "ConnectionError: nobody home")):
        flaky = Flaky(9, hang, is_async)
        with pytest.raises(RewardError, match=f"reward 'flaky.*' failed 3 times, of which the last: {said}") as caught:
            Rewards([Patient(flaky, seconds=0.05, retries=2, pause=0.01)])(ROWS)
        assert "What is 1 + 1?" in str(caught.value)
        assert flaky.calls == 3
    with pytest.raises(RewardError, match="failed once, its only try: no answer"):
        Rewards([Patient(Flaky(1, 5.0, is_async), seconds=0.05, retries=0)])(ROWS)


def test_an_error_about_the_input_is_not_tried_again():
    calls = []

    def judge(completions):
        calls.append(1)
        raise RowError(1, "no answer in it")

    with pytest.raises(RewardError, match=r"reward 'judge', row 1.*no answer in it"):
        Rewards([Patient(judge, retries=5, pause=9.0)])(ROWS)
    assert len(calls) == 1


def test_a_reward_that_blocks_its_event_loop_does_not_stop_the_clock():
    async def judge(completions):
        time.sleep(1.0)

    started = time.perf_counter()
    with pytest.raises(RewardError, match="no answer within"):
        Rewards([Patient(judge, seconds=0.1, retries=0)])(ROWS)
    assert time.perf_counter() - started < 0.9
    time.sleep(1.0)  # the loop is another test's, too


def test_the_pause_doubles(monkeypatch):
    pauses = []

    async def sleep(seconds, sleep=asyncio.sleep):
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr("lit_rlhf.rewards.waiting.asyncio.sleep", sleep)
    with pytest.raises(RewardError):
        Rewards([Patient(Flaky(9), retries=3, pause=0.5)])(ROWS)
    assert pauses == [0.5, 1.0, 2.0]


def test_patient_rewards_wait_at_the_same_time():
    barrier = threading.Barrier(2, timeout=5)

    def judge(completions):
        barrier.wait()
        assert not torch.is_grad_enabled()
        return [1.0, 2.0]

    scores, parts = Rewards([Patient(judge), Patient(judge)])(ROWS)
    assert scores.tolist() == [2.0, 4.0]
    assert list(parts) == ["judge", "judge_2"]


def test_a_reward_that_hangs_does_not_keep_the_process_from_ending():
    script = """
import time
from test_combine import rollout
from lit_rlhf.rewards import Patient, RewardError, Rewards
try:
    Rewards([Patient(lambda completions: time.sleep(600), seconds=0.1, retries=0)])(rollout())
except RewardError:
    print("gave up")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "gave up\n"), done.stderr


def test_it_wraps_a_rule_in_yaml_and_passes_the_tokenizer_on():
    entry = {
        "class_path": "lit_rlhf.rewards.Patient",
        "init_args": {
            "reward": {"class_path": "lit_rlhf.rewards.LengthBounds", "init_args": {"min": 3}},
            "seconds": 5,
        },
    }
    (patient,) = parse(yaml.safe_dump({"rewards": [entry]})).rewards.rewards
    assert (patient.reward, patient.seconds, patient.name) == (LengthBounds(min=3), 5, "length_bounds")

    class Reader:
        tokenizer = None

        def bind(self, tokenizer):
            self.tokenizer = tokenizer

        def __call__(self, completions):
            return [0.0, 0.0]

    patient = Patient(Reader())
    Rewards([patient]).bind("the policy's")
    assert copy.deepcopy(patient).reward.tokenizer == "the policy's"


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"seconds": 0}, "seconds is 0"), ({"retries": -1}, "retries is -1"), ({"pause": -1.0}, "pause is -1")],
)
def test_limits_that_mean_nothing_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        Patient(Flaky(0), **knobs)


def test_a_network_in_this_process_is_refused():
    class Marks:
        def score_rollout(self, rollout):
            """Scores."""

    with pytest.raises(ValueError, match="Patient wraps functions"):
        Patient(Marks())
