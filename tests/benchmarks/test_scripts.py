"""The scripts that measure run, and what they take away for an ablation changes the time and not the draws."""

from __future__ import annotations

import json
from pathlib import Path

import gpu
import packing
import prefix
import pytest
import rollout
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from work import SHAPES, Work, save_models


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy")
    save_models("toy", path)
    return path


def test_the_gpu_script_runs_dry_and_says_what_it_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu.py", "--dry", "--json", str(tmp_path / "gpu.json")])
    gpu.main()
    found = json.loads((tmp_path / "gpu.json").read_text())
    names = {"decode, groups of 8: share of floor", "cuda graphs, groups of 1: tokens/s", "update: share of products"}
    assert names <= set(found)
    assert found["cuda graphs, groups of 8: mean log-prob gap of equal tokens"] < 0.05  # of bfloat16
    if not torch.cuda.is_available():
        assert found["update, liger"].startswith("not run: ")
    assert "| update: tokens/s |" in capsys.readouterr().out
    if not torch.cuda.is_available():
        monkeypatch.setattr("sys.argv", ["gpu.py"])
        with pytest.raises(SystemExit, match="no CUDA device here"):
            gpu.main()


def test_a_row_of_the_rollout_table(monkeypatch):
    row = rollout.compare("toy", "ragged", 4, 4, 1, {"GFLOP/s": 100.0})
    assert row["responses"] == 16
    assert 16 * 8 <= row["tokens"] <= 16 * 64
    assert row["faster"] == pytest.approx(row["generate"] / row["ours"])
    assert row["of floor"] == pytest.approx(row["ours"] / row["floor"])


@pytest.mark.parametrize("remedy", ["prompts read once a group", "ended rows leave", "two-level draw"])
def test_what_an_ablation_takes_away_changes_the_work_and_not_the_draws(remedy, toy):
    bench = rollout.Bench(Work("grpo", shape="toy", lengths="ragged", rows=2, group=8, steps=1), toy)
    seen: list[tuple[int, int]] = []
    bench.policy.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    whole = bench.ours()
    tokens = sum(rows * width for rows, width in seen)
    seen.clear()
    with rollout.without(remedy):
        plain = bench.ours()
    if remedy == "two-level draw":
        assert not torch.equal(plain.response_ids, whole.response_ids)
        return
    assert torch.equal(plain.response_ids, whole.response_ids)
    assert sum(rows * width for rows, width in seen) > tokens


def test_the_table_of_shared_prompts(monkeypatch, capsys):
    asked = ["prefix.py", "--shapes", "toy", "--prompts", "128", "--rows", "4", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", asked)
    prefix.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| grpo, 4 prompts × 8"] * 2 + ["| reward, 16 pairs"] * 2


def test_the_ways_of_the_packing_table_read_the_same(monkeypatch):
    model = LlamaForCausalLM(LlamaConfig(**SHAPES["toy"])).train()
    ids, mask = packing.batch([3, 9, 4], 259, "cpu")
    padded, *others = (read(model, ids, mask)[0] for read in packing.WAYS.values())
    for other in others:
        torch.testing.assert_close(other, padded, atol=1e-5, rtol=0)
    assert set(packing.measure(model, [3, 9, 4], 1, "cpu")) == set(packing.WAYS)
