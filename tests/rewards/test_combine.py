"""Rewards: how they are called, weighted, named, and what is said when one misbehaves."""

from __future__ import annotations

import asyncio
import copy
import functools
import pickle
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lit_rlhf.batch import Rollout
from lit_rlhf.rewards import ContainsWords, ExactMatch, RegexFormat, RewardError, Rewards, RowError

NAN = float("nan")
PROMPTS = ("What is 1 + 1?", [{"role": "user", "content": "first"}, {"role": "user", "content": "And  2\n+ 2?"}])


def rollout(**columns: tuple[Any, ...]) -> Rollout:
    """Two responses, one of them a chat; padding ids are 0 and also occur in a response."""
    return Rollout(
        prompt_ids=torch.tensor([[0, 1], [3, 4]]),
        prompt_mask=torch.tensor([[False, True], [True, True]]),
        response_ids=torch.tensor([[5, 2, 0], [0, 7, 8]]),
        mask=torch.tensor([[True, True, False], [True, True, True]]),
        ended=torch.tensor([True, False]),
        prompts=PROMPTS,
        completions=("two", "it is four"),
        columns=columns,
    )


def returning(result: Any, name: str = "judge") -> Any:
    """A reward that returns ``result`` whatever it is given."""

    def judge(prompts, completions, **columns):
        return result

    judge.__name__ = name
    return judge


def length(prompts, completions, **columns) -> list[float]:
    return [float(len(completion)) for completion in completions]


class Marks(nn.Module):
    """A judge of token ids."""

    name = "marks"

    def __init__(self, scores: Any) -> None:
        super().__init__()
        self.scores, self.weight, self.tokenizer = scores, nn.Parameter(torch.zeros(1)), None

    def score_rollout(self, rollout: Rollout) -> Any:
        return self.scores

    def bind(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer


# -- what a reward is given -----------------------------------------------------------------------------------------


def test_a_reward_gets_prompts_completions_ids_and_every_column() -> None:
    seen = {}

    def judge(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, **columns)
        return [0.0, 0.0]

    Rewards([judge])(rollout(answer=("2", "4"), kind=(None, "b")))
    assert seen == {
        "prompts": list(PROMPTS),
        "completions": ["two", "it is four"],
        "completion_ids": [[5, 2], [0, 7, 8]],
        "answer": ["2", "4"],
        "kind": [None, "b"],
    }


def test_a_reward_without_kwargs_gets_what_it_names() -> None:
    def by_answer(completions, answer, extra=(1.0, 2.0)):
        return [float(a == "4") + e for a, e in zip(answer, extra, strict=True)]

    scores, _ = Rewards([by_answer])(rollout(answer=("2", "4"), kind=(1, 2)))
    assert scores.tolist() == [1.0, 3.0]
    scores, _ = Rewards([by_answer])(rollout(answer=("2", "4"), extra=(10, 20)))
    assert scores.tolist() == [10.0, 21.0]


def test_partials_methods_lambdas_and_modules_are_rewards() -> None:
    class Judge:
        def __init__(self, value: float) -> None:
            self.value = value

        def score(self, completions):
            return [self.value] * len(completions)

    class Layer(nn.Module):
        def forward(self, completions, answer):
            return torch.tensor([float(a) for a in answer], dtype=torch.float64)

    def add(completions, by):
        return [by] * len(completions)

    rewards = Rewards([functools.partial(add, by=1), Judge(2).score, lambda completions: [3, 3], Layer()])
    scores, parts = rewards(rollout(answer=("2", "4")))
    assert scores.tolist() == [8.0, 10.0]
    assert list(parts) == ["add", "score", "lambda", "layer"]


@pytest.mark.parametrize(
    "judge", [lambda prompts, completions, anwser: [0, 0], lambda anwser, **columns: [0, 0], lambda anwser, /: [0, 0]]
)
def test_a_column_that_is_not_there_is_named_with_those_that_are(judge: Any) -> None:
    message = "reward 'lambda' asks for 'anwser', .* prompts, completions, completion_ids, answer, kind"
    with pytest.raises(RewardError, match=message):
        Rewards([judge])(rollout(answer=("2", "4"), kind=(1, 2)))
    with pytest.raises(RewardError, match="reward 'exact_match' raised LookupError: there is no column 'gold'"):
        Rewards([ExactMatch("gold")])(rollout(answer=("2", "4")))


def test_a_column_under_a_reserved_name_is_refused() -> None:
    with pytest.raises(RewardError, match="rename the dataset's column 'completions'"):
        Rewards([length])(rollout(completions=("a", "b")))


def test_one_reward_cannot_spoil_the_arguments_of_the_next() -> None:
    def vandal(prompts, completions, **columns):
        completions.clear()
        columns["answer"].reverse()
        return [0, 0]

    scores, _ = Rewards([vandal, length, lambda answer: [float(a) for a in answer]])(rollout(answer=("2", "4")))
    assert scores.tolist() == [3 + 2, 10 + 4]


# -- how values become scores ---------------------------------------------------------------------------------------


def test_the_score_is_the_weighted_sum_of_what_applies() -> None:
    rewards = Rewards([returning([1.0, None], "a"), returning([10, 20], "b"), returning([5, 5], "c")], [2.0, -0.5, 0.0])
    scores, parts = rewards(rollout())
    assert scores.tolist() == [2 * 1 - 0.5 * 10, -0.5 * 20]
    assert parts["b"].tolist() == [10, 20]
    assert parts["c"].tolist() == [5, 5]
    assert parts["a"][0] == 1
    assert parts["a"].isnan().tolist() == [False, True]
    assert {scores.dtype, *(part.dtype for part in parts.values())} == {torch.float32}
    assert scores.device == rollout().response_ids.device


@pytest.mark.parametrize(
    "result",
    [
        [1, 0.5],
        (True, 0.5),
        [np.float32(1), np.float16(0.5)],
        np.array([1, 0.5]),
        torch.tensor([1, 0.5], dtype=torch.bfloat16),
        [torch.tensor(1), torch.tensor(0.5)],
    ],
)
def test_any_kind_of_number_will_do(result: Any) -> None:
    assert Rewards([returning(result)])(rollout())[0].tolist() == [1.0, 0.5]


def test_no_gradient_is_recorded_and_none_leaves_a_reward() -> None:
    weight = torch.ones(2, requires_grad=True)

    def judge(completions):
        assert not torch.is_grad_enabled()
        return weight

    scores, parts = Rewards([Marks(weight * 2), judge])(rollout())
    assert not scores.requires_grad
    assert not any(part.requires_grad for part in parts.values())


def test_a_row_to_which_no_reward_applies_is_an_error() -> None:
    with pytest.raises(
        RewardError, match=r"'a, b', row 1 .*no reward applies to this row\. Its prompt: 'And 2 \+ 2\?'"
    ):
        Rewards([returning([1, None], "a"), returning([1, None], "b")])(rollout())
    with pytest.raises(RewardError, match=r"'a', row 1 .*no reward applies"):
        Rewards([returning([1, None], "a"), returning([1, 1], "b")], [1.0, 0.0])(rollout())


def test_an_empty_rollout_calls_nobody() -> None:
    empty = rollout().select(torch.tensor([], dtype=torch.long))
    scores, parts = Rewards([returning("nonsense")])(empty)
    assert scores.shape == parts["judge"].shape == (0,)


# -- names and weights ----------------------------------------------------------------------------------------------


def test_names_come_from_the_reward_and_are_unique() -> None:
    class HTTPJudge:
        def __call__(self, completions):
            return [0, 0]

    class Odd(HTTPJudge):
        name = 3

    rewards = [
        length,
        length,
        HTTPJudge(),
        Odd(),
        ContainsWords(name="mine"),
        RegexFormat("a"),
        returning([], "length_2"),
    ]
    expected = ["length", "length_2", "http_judge", "odd", "mine", "regex_format", "length_2_2"]
    assert Rewards(rewards).names == expected


@pytest.mark.parametrize(
    ("rewards", "weights", "message"),
    [
        ([], None, "rewards is empty"),
        (["math.sqrt"], None, r"rewards\[0\] is 'math.sqrt', which cannot be called"),
        ([length, {"class_path": "a"}], None, r"rewards\[1\] is {'class_path'"),
        ([ExactMatch], None, r"is the class ExactMatch: give an instance"),
        ([length], [1.0, 2.0], "2 reward weights for 1 rewards"),
        ([length, length], [1.0], "1 reward weights for 2 rewards"),
        ([length], [NAN], "must be finite"),
        ([length], [0.0], "every reward weight is 0"),
    ],
)
def test_wrong_lists_are_refused_at_the_door(rewards: list, weights: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rewards(rewards, weights)


def test_modules_are_known_to_pytorch_and_everything_copies() -> None:
    rewards = Rewards([length, Marks(torch.tensor([1.0, 2.0]))])
    assert [name for name, _ in rewards.named_parameters()] == ["networks.0.weight"]
    for again in (copy.deepcopy(rewards), pickle.loads(pickle.dumps(rewards))):
        assert again.rewards[1] is again.networks[0]
        assert again(rollout())[0].tolist() == [4.0, 12.0]
    assert rewards.to(torch.float64).rewards[1].weight.dtype == torch.float64


def test_bind_reaches_the_rewards_that_ask_for_it() -> None:
    marks, tokenizer = Marks(torch.zeros(2)), object()
    Rewards([length, marks]).bind(tokenizer)
    assert marks.tokenizer is tokenizer


# -- asynchronous rewards -------------------------------------------------------------------------------------------


def test_async_rewards_run_concurrently() -> None:
    """Each waits until the other has begun: one after the other, they would wait forever."""
    begun: list[str] = []

    async def meet(mine: str, other: str) -> None:
        begun.append(mine)
        while other not in begun:
            await asyncio.sleep(0.001)

    async def first(completions):
        await asyncio.wait_for(meet("first", "second"), 5)
        return [1, 1]

    class Second:
        async def __call__(self, prompts, completions, **columns):
            await asyncio.wait_for(meet("second", "first"), 5)
            return [10, None]

    scores, parts = Rewards([first, length, Second()])(rollout())
    assert scores.tolist() == [1 + 3 + 10, 1 + 10]
    assert list(parts) == ["first", "length", "second"]


def test_async_rewards_work_inside_a_running_loop() -> None:
    async def judge(completions):
        await asyncio.sleep(0)
        assert not torch.is_grad_enabled()
        return [1, 2]

    async def notebook_cell() -> list[float]:
        return Rewards([judge])(rollout())[0].tolist()

    assert asyncio.run(notebook_cell()) == [1, 2]


def test_a_client_kept_open_between_calls_stays_usable() -> None:
    lock: list[asyncio.Future] = []

    async def judge(completions):
        loop = asyncio.get_running_loop()
        lock.append(loop.create_future())
        assert lock[0].get_loop() is loop
        return [1, 2]

    rewards = Rewards([judge])
    rewards(rollout())
    rewards(rollout())
    assert len(lock) == 2


@pytest.mark.parametrize("error", [ConnectionError("no route"), SystemExit(3), asyncio.CancelledError()])
def test_an_async_reward_that_fails_is_named(error: BaseException) -> None:
    """SystemExit, too, which would otherwise end the thread that the loop runs in and leave the caller waiting."""
    others: list[int] = []

    async def judge(completions):
        raise error

    async def other(completions):
        await asyncio.sleep(0.01)
        others.append(1)
        return [1, 2]

    with pytest.raises(RewardError, match=f"reward 'judge' raised {type(error).__name__}") as caught:
        Rewards([other, judge])(rollout())
    assert caught.value.__cause__ is error
    assert Rewards([other])(rollout())[0].tolist() == [1, 2]
    assert others == [1, 1]


def test_an_async_reward_that_returns_nonsense_is_named() -> None:
    async def judge(completions):
        return [1, NAN]

    with pytest.raises(RewardError, match="reward 'judge', row 1"):
        Rewards([judge])(rollout())


@pytest.mark.filterwarnings("error")
def test_an_error_elsewhere_leaves_no_coroutine_unawaited() -> None:
    async def judge(completions):
        return [1, 2]

    with pytest.raises(RewardError, match="'second'"):
        Rewards([judge, returning(None, "second")])(rollout())


@pytest.mark.filterwarnings("error")
def test_ctrl_c_while_waiting_stops_the_requests() -> None:
    cancelled = threading.Event()

    async def judge(completions):
        interrupt = functools.partial(signal.pthread_kill, threading.main_thread().ident, signal.SIGINT)
        asyncio.get_running_loop().call_later(0.05, interrupt)
        try:
            await asyncio.sleep(30)
        finally:
            cancelled.set()

    # A job in a shell's background is started with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Rewards([judge])(rollout())
    finally:
        signal.signal(signal.SIGINT, before)
    assert cancelled.wait(5)


def test_all_calls_share_one_thread() -> None:
    async def judge(completions):
        return [1, 2]

    Rewards([judge])(rollout())
    before = threading.active_count()
    Rewards([judge])(rollout())
    assert threading.active_count() == before


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], r"returned 1 values for 2 completions"),
        ([1.0, 2.0, 3.0], r"returned 3 values for 2 completions"),
        ([], r"returned 0 values for 2 completions"),
        (None, r"returned NoneType \('None'\), expected a list of 2 values"),
        (0.5, r"returned float \('0.5'\), expected a list"),
        ("ab", r"returned str \('ab'\), expected a list"),
        ({"a": 1, "b": 2}, r"returned dict"),
        (iter([1, 2]), r"returned list_iterator"),
        (torch.tensor(1.0), r"returned Tensor"),
        ([1.0, NAN], r"row 1 .*: returned nan, expected a number finite in float32, or None .*'And 2 \+ 2\?'"),
        ([float("inf"), 1], r"row 0 .*: returned inf, .*'What is 1 \+ 1\?'"),
        ([1, -1e39], r"row 1 .*: returned -1e\+39"),
        ([1, 10**400], r"row 1 .*: returned '1000.*' \(int\), expected a number or None"),
        ([1, "0.5"], r"row 1 .*: returned '0.5' \(str\), expected a number or None"),
        ([1, [2.0]], r"row 1 .*: returned '\[2.0\]' \(list\)"),
        ([1, 2j], r"row 1 .*: returned '2j' \(complex\)"),
        ([float, 1], r"row 0 .*: returned \"<class 'float'>\" \(type\)"),
        (torch.ones(2, 1), r"row 0 .*: returned '\[1.0\]' \(list\)"),
        (torch.tensor([1, NAN]), r"row 1 .*: returned nan"),
    ],
)
def test_a_wrong_result_is_named_with_row_value_and_prompt(result: Any, message: str) -> None:
    with pytest.raises(RewardError, match=f"^reward 'judge'.* {message}"):
        Rewards([length, returning(result)])(rollout())


def test_a_reward_that_raises_is_named_and_chained() -> None:
    def judge(prompts, completions, **columns):
        return [1 / 0]

    with pytest.raises(
        RewardError, match=r"reward 'judge' raised ZeroDivisionError: .*rows 0 to 1; .*'What is"
    ) as caught:
        Rewards([judge])(rollout())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_reward_can_say_which_row_is_wrong() -> None:
    def judge(prompts, completions, **columns):
        raise RowError(1, "has no answer")

    with pytest.raises(RewardError, match=r"reward 'judge', row 1 \(rows 0 to 1\): has no answer\. Its prompt: 'And 2"):
        Rewards([judge])(rollout())
    error = pickle.loads(pickle.dumps(RowError(1, "has no answer")))
    assert (error.row, str(error)) == (1, "has no answer")


def test_ctrl_c_is_no_reward_error() -> None:
    def judge(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Rewards([judge])(rollout())


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, 2.0], r"reward 'marks': score_rollout returned list, expected a tensor of shape \[2\]"),
        (torch.ones(2, 1), r"reward 'marks': score_rollout returned shape \[2, 1\]"),
        (torch.ones(3), r"reward 'marks': score_rollout returned shape \[3\]"),
        (torch.tensor([1, NAN]), r"reward 'marks', row 1 .*: score_rollout returned nan.*'And 2"),
        (torch.tensor([1e300, 1], dtype=torch.float64), r"reward 'marks', row 0 .*: score_rollout returned inf"),
    ],
)
def test_wrong_scores_of_token_ids_are_named(scores: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        Rewards([Marks(scores)])(rollout())


def test_a_failing_judge_of_token_ids_is_named() -> None:
    class Broken(Marks):
        def score_rollout(self, rollout: Rollout) -> Tensor:
            raise RuntimeError("out of memory")

    with pytest.raises(RewardError, match="reward 'marks' raised RuntimeError: out of memory"):
        Rewards([Broken(None)])(rollout())


def test_a_long_prompt_is_cut_in_the_message() -> None:
    long = rollout().with_(prompts=("word " * 1000, "b"))
    with pytest.raises(RewardError) as caught:
        Rewards([returning([NAN, 1])])(long)
    assert len(str(caught.value)) < 250


def test_ten_thousand_rows_are_quick() -> None:
    many = rollout(answer=("2", "4")).select(torch.arange(2).repeat(5000))
    begin = time.thread_time()
    scores, _ = Rewards([ExactMatch(), length])(many)
    assert scores.shape == (10_000,)
    assert time.thread_time() - begin < 3
