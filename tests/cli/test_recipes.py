"""Every recipe that is named after its paper runs two steps and has the settings that make its algorithm."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from recipes import RECIPES


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest, cli) -> Path:
    """Folder of the two-step run of a recipe."""
    name: str = request.param
    if name in ("rloo", "reinforce-pp", "tldr-ppo"):
        request.getfixturevalue("reward_run")
    if name == "instructgpt-ppo":
        request.getfixturevalue("ranking_run")
        rows = [{"text": f"some text, number {i}"} for i in range(8)]
        (cli.folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data, *more = RECIPES[name]
    cli.fit(f"{name}.yaml", data, *more, "--model.sampling.max_new_tokens", "6")
    return cli.folder / "runs" / name


def test_a_recipe_runs_two_steps_and_leaves_a_model(recipe: Path) -> None:
    with (recipe / "version_0" / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    trained = [row for row in rows if row["loss"]]
    assert [int(row["step"]) for row in trained] == [0, 1]
    assert all(math.isfinite(float(row["loss"])) for row in trained)
    assert any(row["val/score_greedy"] for row in rows)
    assert (recipe / "model" / "model.safetensors").is_file()
    assert torch.load(recipe / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    logged, model = trained[-1], _saved(recipe)["model"]["init_args"]
    assert int(float(logged["updates"])) == 2 * model["updates"]["epochs"] * model["updates"]["minibatches"]
    # A KL is measured where the recipe prices one, and nowhere else is a reference loaded.
    assert bool(logged.get("objective/kl_coef")) == (model["kl"]["coef"] > 0)
    assert ("groups/replaced" in logged) == (recipe.name == "dapo")
    assert ("pretraining/loss" in logged) == (recipe.name == "instructgpt-ppo")


def _saved(run: Path) -> dict:
    return yaml.safe_load((run / "version_0" / "config.yaml").read_text(encoding="utf-8"))
