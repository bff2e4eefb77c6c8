"""docs/algorithms.md against the code: its table of settings, its recipes, and every name it gives."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml
from recipes import RECIPES

import lit_rlhf
from lit_rlhf import objectives
from lit_rlhf.models import trunk
from lit_rlhf.rewards import NumericMatch, Steps
from lit_rlhf.stages import GRPO, PPO, settings, shaping

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^#+ (.+)$", TEXT, re.M)
STAGES = {"PPO": PPO, "GRPO": GRPO}


def _rows() -> list[Any]:
    """Name, section, stage, settings and recipes of each line of the table at the top."""
    rows = []
    for line in TEXT.split("## With a critic")[0].splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" |")]
        link = re.fullmatch(r"\[(.+)\]\(#(.+)\)", cells[0])
        if link is None or len(cells) != 4:
            continue
        given = yaml.safe_load("{" + cells[2].strip("`") + "}")
        recipes = re.findall(r"\((\.\./configs/[\w-]+\.yaml)\)", cells[3])
        rows += [
            pytest.param(link[2], stage, given, recipes, id=f"{link[1]}-{stage}") for stage in cells[1].split(", ")
        ]
    return rows


ROWS = _rows()
IN_RECIPES = [row for row in ROWS if row.values[3]]


def build(stage: str, folder: str, given: dict) -> Any:
    """The stage as a YAML with these settings makes it."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(STAGES[stage], "stage")
    rewards = ["lit_rlhf.rewards.NumericMatch"]
    return parser.instantiate(parser.parse_object({"stage": {"model": folder, "rewards": rewards, **given}})).stage


def values(stage: Any, knob: str) -> Any:
    """What a setting has become."""
    found = {"updates": lambda: stage.updates.settings, "shaping": lambda: stage.shaping.settings}.get(knob)
    value = found() if found else stage.hparams[knob]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def test_the_table_is_read() -> None:
    assert len(ROWS) > 25
    assert {row.values[1] for row in ROWS} == set(STAGES)


@pytest.mark.parametrize(("section", "stage", "given", "recipes"), ROWS)
def test_the_settings_of_the_table_make_the_stage_and_are_no_defaults(
    section: str, stage: str, given: dict, recipes: list[str], model_folder: str
) -> None:
    anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in HEADINGS]
    assert re.sub(r"-\d$", "", section) in anchors
    made, plain = build(stage, model_folder, given), build(stage, model_folder, {})
    assert isinstance(made.rewards.rewards[0], NumericMatch)
    for knob, wanted in given.items():
        now, before = values(made, knob), values(plain, knob)
        if isinstance(wanted, dict):
            assert {key: now[key] for key in wanted} == wanted
            rest = set(now) - set(wanted)
            assert before is None or {key: now[key] for key in rest} == {key: before[key] for key in rest}
        assert now != before, f"{knob} is the default"


@pytest.mark.parametrize(("section", "stage", "given", "recipes"), IN_RECIPES)
def test_a_recipe_has_the_settings_of_the_table(section: str, stage: str, given: dict, recipes: list[str]) -> None:
    for recipe in recipes:
        model = yaml.safe_load((ROOT / "docs" / recipe).read_text(encoding="utf-8"))["model"]
        assert model["class_path"] == f"lit_rlhf.{stage}"
        for knob, wanted in given.items():
            named = model["init_args"][knob]
            assert named == wanted if not isinstance(wanted, dict) else wanted.items() <= named.items()


def test_every_recipe_is_in_the_table_and_every_link_leads_somewhere() -> None:
    listed = {Path(recipe).stem for row in IN_RECIPES for recipe in row.values[3]}
    assert listed == {*RECIPES, "ppo", "grpo"}
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", TEXT):
        assert (ROOT / "docs" / link).exists(), link
    for recipe in re.findall(r"`([\w-]+\.yaml)`", TEXT):
        assert recipe == "round2.yaml" or (ROOT / "configs" / recipe).is_file(), recipe


def test_every_function_that_the_page_names_exists() -> None:
    names = {name for line in re.findall(r"Functions?: (.+?)\. ", TEXT.replace("\n", " ")) for name in _quoted(line)}
    assert len(names) >= 18
    missing = [name for name in names if not hasattr(objectives, name) and not hasattr(trunk, name)]
    assert missing == []


def test_every_setting_that_the_page_names_exists() -> None:
    """``clip.low``, ``kl: {…}`` and the like, and the arguments of the stages."""
    groups = {
        "kl": settings.KL,
        "clip": settings.Clip,
        "advantages": settings.Advantages,
        "entropy": settings.Entropy,
        "value": settings.Value,
        "correction": settings.Correction,
        "shaping": shaping.Shaping,
        "updates": lit_rlhf.Updates,
        "sampling": lit_rlhf.Sampling,
    }
    dotted = re.findall(rf"`({'|'.join(groups)})\.(\w+)", TEXT)
    within = [
        (group, name)
        for group, inside in re.findall(rf"({'|'.join(groups)}): \{{([^}}]*)\}}", TEXT)
        for name in re.findall(r"(\w+):", inside)
    ]
    assert len(dotted) > 15
    assert len(within) > 40
    for group, name in dotted + within:
        assert name in {field.name for field in dataclasses.fields(groups[group])}, f"{group}.{name}"
    arguments = {name for stage in STAGES.values() for name in inspect.signature(stage).parameters}
    for name in ("lam", "gamma", "ptx_coef", "ema", "groups", "truncated", "aggregation", "refresh_reference"):
        assert name in arguments
        assert f"`{name}" in TEXT


def test_the_example_of_a_reward_that_judges_steps_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    names = {"Steps": Steps}
    exec(compile(code, "algorithms.md", "exec"), names)
    (said,) = names["judge_lines"](["p"], ["c"], [[5, 6, 7]])
    assert said == Steps([0.5, 1.0], [1, 2])


def _quoted(text: str) -> list[str]:
    return re.findall(r"`([a-z_]+)`", text)
