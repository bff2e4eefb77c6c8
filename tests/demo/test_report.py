"""What the demo says about its results, on fixed numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_rlhf.demo.measure import Measured, bootstrap_mean
from lit_rlhf.demo.picture import draw, read_curves, smooth
from lit_rlhf.demo.report import judge_policy, side_by_side, table


def measured(name: str = "PPO", gain: float = 1.0, kl: float = 8.0, well_formed: int = 19, count: int = 20) -> Measured:
    """Twenty stories; without a gain the gold scores are those of SFT."""
    gold = [float(i % 4) + gain for i in range(count)]
    return Measured(
        name,
        prompts=[f"prompt {i}" for i in range(count)],
        texts=[f" {name} story {i}" for i in range(count)],
        gold=gold,
        proxy=[g / 2 for g in gold],
        kl=[kl] * count,
        words=[0.5] * count,
        finished=[True] * count,
        well_formed=[i < well_formed for i in range(count)],
    )


SFT = measured("SFT", gain=0.0, kl=0.0)


def test_bootstrap_covers_the_mean_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        mean, low, high = bootstrap_mean(rng.exponential(size=60).tolist(), resamples=400)
        assert low <= mean <= high
        inside += low <= 1.0 <= high
    assert 0.89 < inside / 300 < 0.98


def test_bootstrap_width_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(1).normal(size=400)
    _, low, high = bootstrap_mean(values.tolist())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)


def test_the_table_on_fixed_numbers() -> None:
    lines = table([SFT, measured()]).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "policy", "gold score", "proxy score", "KL (nats)", "words used", "finished", "well-formed",
    ]  # fmt: skip
    mean, low, high = bootstrap_mean(measured().gold)
    assert [cell.strip() for cell in lines[3].split("|")[1:5]] == [
        "PPO", f"2.50 [{low:.2f}, {high:.2f}]", lines[3].split("|")[3].strip(), "8.00 [8.00, 8.00]",
    ]  # fmt: skip
    assert "95% [85%, 100%]" in lines[3]
    assert len({len(line) for line in lines}) == 1
    assert mean == 2.5


@pytest.mark.parametrize(
    ("tuned", "why"),
    [
        (measured(), None),
        (measured(gain=0.4), "the gain is not clearly above 0.5"),
        (measured(gain=-1.0), "the gain is not clearly above 0.5"),
        (measured(kl=26.0), "the KL is above 25 nats"),
        (measured(well_formed=15), "fewer than 90% of SFT's share are well-formed"),
    ],
)
def test_the_verdict_says_why(tuned: Measured, why: str | None) -> None:
    verdict = judge_policy(SFT, tuned)
    assert verdict.passed == (why is None)
    assert verdict.sentence.startswith("PASSED PPO" if why is None else "FAILED PPO")
    assert (why or "20 held-out prompts, at a KL of 8.0 nats a story, 95% well-formed (SFT 95%).") in verdict.sentence


def test_a_gain_on_few_prompts_only_is_not_clear() -> None:
    lucky = measured(gain=0.0)
    lucky.gold[0] = 20.0
    assert bootstrap_mean([a - b for a, b in zip(lucky.gold, SFT.gold, strict=True)])[0] > 0.5
    assert not judge_policy(SFT, lucky).passed


def test_texts_stand_under_their_prompt() -> None:
    shown = side_by_side([SFT, measured()], count=2)
    assert shown.splitlines()[:3] == ["prompt 0", "  SFT:  [+0.00] SFT story 0", "  PPO:  [+1.00] PPO story 0"]
    assert shown.splitlines()[4:6] == ["prompt 1", "  SFT:  [+1.00] SFT story 1"]
    assert "prompt 2" not in shown


def test_curves_come_from_the_rollouts_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(
        "step,rewards/gold/mean,rewards/reward_model/mean,objective/kl,lr\n0,1.0,0.1,0.0,\n0,,,,0.1\n1,2.0,0.2,3.0,\n"
    )
    assert read_curves(path) == {"step": [0.0, 1.0], "gold": [1.0, 2.0], "proxy": [0.1, 0.2], "kl": [0.0, 3.0]}


def test_smoothing_averages_neighbours() -> None:
    assert smooth([1.0, 2.0, 6.0], window=3) == [1.5, 3.0, 4.0]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    curve = {"step": [0.0, 1.0, 2.0], "gold": [0.0, 1.0, 2.0], "proxy": [0.0, 0.5, 1.0], "kl": [0.0, 2.0, 8.0]}
    draw({"PPO": curve, "GRPO": curve}, [SFT, measured(), measured("GRPO")], tmp_path / "curves.png")
    image = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).reshape(-1, 3).astype(int)
    assert len(image) > 500_000
    blue, orange = (31, 111, 180), (209, 96, 43)
    assert all((abs(image - colour).max(axis=1) < 8).sum() > 50 for colour in (blue, orange))
