"""Every shipped config runs, leaves what a run must leave, and feeds the next stage."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from recipes import RECIPES
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.commands.configs import config_folder
from lit_rlhf.models import Network, load_causal

STAGES = ["sft", "reward", "ranking", "ppo", "grpo"]
OVERLAYS = ["tiny", "lora", "roles", "fsdp", "wandb", "profile", "packed"]


@pytest.fixture(params=STAGES)
def run(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_run")


def steps(run: Path) -> list[dict[str, str]]:
    with (run / "version_0" / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_shipped_config_is_run_here() -> None:
    assert sorted(path.stem for path in config_folder().glob("*.yaml")) == sorted([*STAGES, *OVERLAYS, *RECIPES])


def test_two_steps_are_logged_and_validated(run: Path) -> None:
    rows = steps(run)
    assert {int(row["step"]) for row in rows} == {0, 1}
    key = {"sft": "val/loss", "reward": "val/accuracy", "ranking": "val/accuracy"}.get(run.name, "val/score_greedy")
    assert any(row[key] for row in rows)


def test_the_run_keeps_its_whole_config(run: Path) -> None:
    saved = yaml.safe_load((run / "version_0" / "config.yaml").read_text(encoding="utf-8"))
    assert saved["trainer"]["max_steps"] == 2
    assert saved["seed_everything"] == 42
    assert saved["data"]["init_args"]["batch_size"] == 2
    assert saved["model"]["init_args"]["optim"]["weight_decay"] == 0.0  # a default nobody wrote
    logged = yaml.safe_load((run / "version_0" / "hparams.yaml").read_text(encoding="utf-8"))
    assert logged["cli"]["trainer"]["max_steps"] == 2


def test_the_last_step_can_be_resumed_from(run: Path) -> None:
    checkpoints = run / "version_0" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["last.ckpt", "step=2.ckpt"]
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("name", ["sft", "ppo", "grpo"])
def test_sample_texts_are_written(name: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(f"{name}_run")
    lines = (run / "version_0" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert {sample["mode"] for sample in samples} == {"greedy", "sampled"}
    assert all(isinstance(sample["prompt"], str) and sample["step"] == 2 for sample in samples)


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_exported_policy_loads_in_transformers_with_the_trained_logits(
    name: str, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(f"{name}_run")
    loaded = AutoModelForCausalLM.from_pretrained(run / "model")
    trained = load_causal(str(run / "model"), Network()).eval()
    state = torch.load(run / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    state = {key.removeprefix("policy."): value for key, value in state.items() if key.startswith("policy.")}
    trained.load_state_dict(state)
    ids = torch.arange(3, 40).unsqueeze(0)
    torch.testing.assert_close(loaded(ids).logits, trained(ids).logits)
    start = AutoModelForCausalLM.from_pretrained(run.parent.parent / "base")
    assert not torch.equal(loaded(ids).logits, start(ids).logits), "nothing was learned"


def test_exported_adapters_are_merged(ppo_run: Path, sft_run: Path) -> None:
    """PPO ran with LoRA: its folder is a whole model that differs from the SFT model's."""
    ids = torch.arange(3, 40).unsqueeze(0)
    merged = AutoModelForCausalLM.from_pretrained(ppo_run / "model")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    before = AutoModelForCausalLM.from_pretrained(sft_run / "model")
    assert not torch.equal(merged(ids).logits, before(ids).logits)
    saved = torch.load(ppo_run / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {key.split(".")[0] for key in saved} >= {"policy", "critic"}
    assert not any("embed_tokens" in key or key.startswith(("reference", "rewards")) for key in saved)


@pytest.mark.parametrize("name", ["reward", "ranking"])
def test_exported_reward_model_is_a_standard_folder(name: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(f"{name}_run")
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert model.config.num_labels == 1
    assert isinstance(model.config.reward_mean, float)
    assert (model.config.reward_std == 1.0) == (name == "ranking")  # a bias only
    assert AutoTokenizer.from_pretrained(run / "model").eos_token == "</s>"


@pytest.mark.parametrize("name", ["reward", "ranking"])
def test_a_reward_model_leaves_its_tables_to_open(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{name}_run") / "version_0"
    counts = []
    for table in ("calibration", "length_bias"):
        with (folder / f"{table}.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert {row["step"] for row in rows} == {"2"}
        counts.append(sum(int(row["count"]) for row in rows))
    assert counts[0] == counts[1] > 0  # every comparison of the one held-out batch is in one bin of each


def test_the_profile_overlay_says_where_the_time_goes_and_replaces_no_model(cli, sft_run: Path) -> None:
    root, trained = cli.folder / "runs" / "profiled", (sft_run / "model" / "model.safetensors").read_bytes()
    where = ("--trainer.default_root_dir", str(root), "--model.model", "base")
    cli.fit("sft.yaml", "sft.jsonl", *where, "--config", "profile.yaml", "--trainer.accumulate_grad_batches", "2")
    table = (root / "version_0" / "fit-profile.txt").read_text(encoding="utf-8").splitlines()
    calls = {line.split()[0].split("]")[-1]: int(line.split()[-1]) for line in table if line.rstrip()[-1:].isdigit()}
    assert calls["SingleDeviceStrategy.training_step"] == 4  # every one, not a few of them
    assert calls["SFT.optimizer_step"] == 2
    assert any(name.startswith("aten::") for name in calls)
    assert len(table) < 60
    assert (sft_run / "model" / "model.safetensors").read_bytes() == trained


def test_every_run_logs_speed_shares_and_memory(run: Path) -> None:
    for row in steps(run):
        if not row["loss"]:
            continue  # a validation's
        phases = {"rollout", "score", "update", "other"} if run.name in ("ppo", "grpo") else {"update", "other"}
        shares = {
            key.removeprefix("share/"): float(value) for key, value in row.items() if key[:6] == "share/" and value
        }
        assert set(shares) == phases
        assert sum(shares.values()) == pytest.approx(1)
        assert float(row["throughput/tokens_per_second"]) > 0
        assert 0.05 < float(row["memory/peak_gb"]) < 100


def test_the_packed_overlay_and_a_mixture_of_sources_run_and_are_kept(cli) -> None:
    root, mixture = cli.folder / "runs" / "packed", cli.folder / "mixture.yaml"
    sources = ["sums.jsonl", {"path": "math.jsonl", "weight": 0.5}]
    columns = {"prompt_template": "{question}", "completion_column": "answer"}
    rows = [{"question": f"{i}?", "answer": f" answer {i}"} for i in range(24)]
    (cli.folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    mixture.write_text(yaml.safe_dump({"data": {"init_args": {"train": sources, **columns}}}))
    where = ("--config", "packed.yaml", "--config", str(mixture), "--trainer.default_root_dir", str(root))
    overlay = ("--config", "tiny.yaml", "--model.model", "base", "--export.folder", str(root / "model"))
    cli("fit", "--config", "sft.yaml", *overlay, *where)
    saved = yaml.safe_load((root / "version_0" / "config.yaml").read_text(encoding="utf-8"))
    assert saved["model"]["init_args"]["packing"] is True
    assert saved["data"]["init_args"]["train"] == sources
    assert torch.load(root / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_one_base_serves_four_roles(cli, sft_run: Path) -> None:
    """The reward model is trained and exported as adapters, from which judge and critic of PPO start."""
    root, shown = cli.folder / "runs" / "roles", ("--model.sampling.max_new_tokens", "6")
    to = ("--export.merge", "false", "--export.folder", "runs/reward/adapters")
    cli.fit(
        "reward.yaml", "pref.jsonl", "--config", "lora.yaml", *to, "--trainer.default_root_dir", str(root / "reward")
    )
    where = ("--trainer.default_root_dir", str(root / "ppo"), "--export.folder", str(root / "model"))
    cli.fit("ppo.yaml", "sft.jsonl", *shown, "--config", "roles.yaml", *where)
    saved = torch.load(root / "ppo" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    kinds = {kind: sum(f".{kind}." in key for key in saved) for kind in ("default", "critic", "reward")}
    assert kinds == {"default": 28, "critic": 28, "reward": 0}
    assert not any("embed_tokens" in key for key in saved)
    rows = steps(root / "ppo")
    assert any(row["rewards/reward_adapter/mean"] for row in rows)
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_pretraining_text_comes_with_the_prompts_from_the_command_line(cli) -> None:
    root = cli.folder / "runs" / "ptx"
    more = ("--data.pretraining", '[{"path": "texts.jsonl", "weight": 2.0}]', "--data.pretraining_batch_size", "4")
    (cli.folder / "texts.jsonl").write_text('{"text": "some text"}\n', encoding="utf-8")
    where = ("--trainer.default_root_dir", str(root), "--model.model", "base", "--export.folder", str(root / "model"))
    sampling = ("--model.sampling.max_new_tokens", "4")
    cli.fit("grpo.yaml", "math.jsonl", *where, *sampling, *more)
    stored = torch.load(root / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)["PromptData"]
    assert stored["pretraining"] == 8
