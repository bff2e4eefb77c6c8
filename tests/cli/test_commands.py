"""generate, pairs, export, configs and the door itself."""

from __future__ import annotations

import csv
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lit_rlhf
from lit_rlhf.cli import COMMANDS, command
from lit_rlhf.data import PreferenceData

ROOT = Path(lit_rlhf.__file__).parent.parent
SHORT = ("--sampling.max_new_tokens", "6")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_prompt_is_continued_on_the_screen(cli, sft_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    cli("generate", "--model", "runs/sft/model", "--prompt", "Once", "--sampling.temperature", "0", *SHORT)
    first = capsys.readouterr().out
    assert first.startswith("Once")
    assert len(first) > len("Once\n")
    cli("generate", "--model", "runs/sft/model", "--prompt", "Once", "--sampling.temperature", "0", *SHORT)
    assert capsys.readouterr().out == first


def test_a_file_of_prompts_is_continued_in_order(cli, sft_run: Path) -> None:
    args = ("generate", "--model", "runs/sft/model", "--prompts", "sft.jsonl", "--limit", "5", "--samples", "2", *SHORT)
    cli(*args, "--batch_size", "2", "--output", "out/texts.jsonl")
    rows = read(cli.folder / "out" / "texts.jsonl")
    assert [row["prompt"] for row in rows] == [f"Q{i}:" for i in range(5) for _ in range(2)]
    assert set(rows[0]) == {"prompt", "completion", "ended"}
    cli(*args, "--batch_size", "2", "--seed", "1", "--output", "out/others.jsonl")
    assert read(cli.folder / "out" / "others.jsonl") != rows, "the seed changed nothing"
    cli(*args, "--batch_size", "2", "--output", "out/again.jsonl")
    assert read(cli.folder / "out" / "again.jsonl") == rows


def test_other_columns_chat_and_first_words(cli, sft_run: Path) -> None:
    common = ("generate", "--model", "runs/sft/model", "--prompts", "math.jsonl", "--prompt_column", "question", *SHORT)
    cli(*common, "--limit", "2", "--chat", "true", "--output", "out/chat.jsonl")
    rows = read(cli.folder / "out" / "chat.jsonl")
    assert rows[0]["prompt"] == [{"role": "user", "content": "0 + 1?"}]
    assert rows[1]["answer"] == "#### 2"
    cli(*common, "--limit", "2", "--prompt_words", "2", "--output", "out/words.jsonl")
    assert [row["prompt"] for row in read(cli.folder / "out" / "words.jsonl")] == ["0 +", "1 +"]


def by_count(prompts: list, completions: list[str]) -> list[float]:
    """A judge that counts letters below n."""
    return [float(sum(c < "n" for c in text)) for text in completions]


def test_pairs_are_ordered_by_the_reward_and_feed_the_reward_model(cli, sft_run: Path, monkeypatch) -> None:
    (cli.folder / "judge.py").write_text(
        "def letters(prompts, completions):\n    return [float(sum(c < 'n' for c in text)) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(str(cli.folder))
    args = ("pairs", "--policy", "runs/sft/model", "--prompts", "sft.jsonl", "--reward", "judge.letters", *SHORT)
    cli(*args, "--output", "out/pairs.jsonl")
    rows = read(cli.folder / "out" / "pairs.jsonl")
    assert 0 < len(rows) <= 24
    for row in rows:
        assert [row["chosen_score"], row["rejected_score"]] == by_count([], [row["chosen"], row["rejected"]])
        assert row["chosen_score"] > row["rejected_score"]
    data = PreferenceData(str(cli.folder / "out" / "pairs.jsonl"), tokenizer=str(cli.folder / "base"))
    data.setup("fit")
    assert len(next(iter(data.train_dataloader()))) > 0

    cli(*args, "--output", "out/wide.jsonl", "--min_gap", "2")
    wide = read(cli.folder / "out" / "wide.jsonl")
    assert wide == [row for row in rows if row["chosen_score"] - row["rejected_score"] > 2]

    cli(*args, "--output", "out/ranked.jsonl", "--samples", "4", "--limit", "8")
    for row in read(cli.folder / "out" / "ranked.jsonl"):
        assert row["scores"] == sorted(by_count([], row["responses"]), reverse=True)
        assert [a < b for a, b in zip(row["ranks"], row["ranks"][1:], strict=False)] == [
            a > b for a, b in zip(row["scores"], row["scores"][1:], strict=False)
        ]


def test_a_learned_judge_labels_pairs(cli, reward_run: Path) -> None:
    cli(
        *("pairs", "--policy", "runs/sft/model", "--prompts", "sft.jsonl", "--limit", "4", "--output", "out/rm.jsonl"),
        *("--reward", "lit_rlhf.rewards.RewardModel", "--reward.model", "runs/reward/model", *SHORT),
    )
    rows = read(cli.folder / "out" / "rm.jsonl")
    assert len(rows) > 0
    assert all(row["chosen_score"] > row["rejected_score"] for row in rows)


def test_pairs_that_all_tie_are_an_error(cli, sft_run: Path, refused, monkeypatch) -> None:
    (cli.folder / "flat.py").write_text("def flat(prompts, completions):\n    return [1.0] * len(completions)\n")
    monkeypatch.syspath_prepend(str(cli.folder))
    lines = refused(
        *("pairs", "--policy", "runs/sft/model", "--prompts", "sft.jsonl", "--limit", "2", *SHORT),
        *("--reward", "flat.flat", "--output", "out/flat.jsonl"),
    )
    assert "all tie" in lines[-1]


@pytest.fixture
def letters(cli, monkeypatch: pytest.MonkeyPatch) -> str:
    """A judge that counts letters below n, and none of a module that another test imported."""
    (cli.folder / "some_judge.py").write_text(
        "def letters(prompts, completions):\n    return [float(sum(c < 'n' for c in text)) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(str(cli.folder))
    return "some_judge.letters"


def test_best_of_n_keeps_what_the_reward_likes_best_and_feeds_sft(
    cli, sft_run: Path, letters: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--policy", "runs/sft/model", "--prompts", "sft.jsonl", "--reward", letters, "--limit", "8", *SHORT)
    args = ("best-of-n", *args, "--samples", "4")
    capsys.readouterr()
    cli(*args, "--output", "out/all.jsonl", "--keep", "3")
    assert "KL of the best 3 of 4 from the policy: at most 0.288 nats" in capsys.readouterr().out
    cli(*args, "--output", "out/best.jsonl")
    said = capsys.readouterr().out
    rows, wide = read(cli.folder / "out" / "best.jsonl"), read(cli.folder / "out" / "all.jsonl")
    assert [row["prompt"] for row in rows] == [f"Q{i}:" for i in range(8)]
    assert rows == wide[::3], "the best three begin with the best"
    for row in wide:
        assert by_count([], [row["completion"]]) == [row["score"]]
        assert row["samples"] == 4
    for i in range(0, 24, 3):
        top = [row["score"] for row in wide[i : i + 3]]
        worst = 4 * wide[i]["mean_score"] - sum(top)  # the one that was not kept
        assert sorted([*top, worst], reverse=True) == pytest.approx([*top, worst])
    first = re.search(r"first answer (\S+), best of 4 (\S+)", said)
    assert first is not None
    assert float(first[1]) <= float(first[2]) == pytest.approx(sum(row["score"] for row in rows) / 8, rel=1e-3)
    assert "at most 0.636 nats a response" in said  # log 4 − 3 / 4
    cut_off = sum(not row["ended"] for row in rows)
    assert f"{cut_off} of the answers kept were cut off" in said
    where = ("--model.model", "base", "--trainer.default_root_dir", "runs/rejection")
    cli.fit("sft.yaml", "out/best.jsonl", *where, "--export.folder", "out/rejection", "--model.sample_prompts", "0")


def test_best_of_n_refuses_what_is_no_choice(cli, sft_run: Path, letters: str, refused) -> None:
    args = ("best-of-n", "--policy", "runs/sft/model", "--prompts", "sft.jsonl", "--reward", letters, *SHORT)
    args = (*args, "--limit", "2", "--output", "out/none.jsonl")
    assert "samples is 1" in refused(*args, "--samples", "1")[-1]
    assert (
        "keep is 4: expected 1 or more and fewer than samples=4" in refused(*args, "--samples", "4", "--keep", "4")[0]
    )
    lines = refused(*args, "--samples", "2", "--only_ended", "true", "--sampling.max_new_tokens", "1")
    assert "no answer can be kept: those to all 2 prompts are blank or cut off" in lines[-1]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in peft
def test_export_merges_adapters_or_keeps_them(cli, ppo_run: Path) -> None:
    checkpoint = "runs/ppo/version_0/checkpoints/last.ckpt"
    cli("export", "--checkpoint", checkpoint, "--folder", "out/merged")
    cli("export", "--checkpoint", checkpoint, "--folder", "out/adapters", "--merge", "false")
    ids = torch.arange(3, 40).unsqueeze(0)
    merged = AutoModelForCausalLM.from_pretrained(cli.folder / "out" / "merged")
    at_the_end = AutoModelForCausalLM.from_pretrained(ppo_run / "model")
    torch.testing.assert_close(merged(ids).logits, at_the_end(ids).logits, rtol=0, atol=0)
    base = AutoModelForCausalLM.from_pretrained(cli.folder / "runs" / "sft" / "model")
    kept = PeftModel.from_pretrained(base, cli.folder / "out" / "adapters").eval()
    torch.testing.assert_close(kept(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)


def test_export_of_a_reward_model(cli, reward_run: Path) -> None:
    cli("export", "--checkpoint", "runs/reward/version_0/checkpoints/last.ckpt", "--folder", "out/rm")
    config = json.loads((cli.folder / "out" / "rm" / "config.json").read_text(encoding="utf-8"))
    at_the_end = json.loads((reward_run / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["reward_mean"] == at_the_end["reward_mean"]


def test_a_checkpoint_of_something_else_is_refused(cli, refused) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": {"_class_path": "torch.nn.Linear"}}, cli.folder / "other.ckpt")
    assert "not made by a stage" in refused("export", "--checkpoint", "other.ckpt", "--folder", "x")[0]


def test_help_lists_every_command_and_configs_every_config(cli, capsys: pytest.CaptureFixture[str]) -> None:
    cli("--help")
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    cli("configs")
    folder, *names = capsys.readouterr().out.splitlines()
    assert Path(folder).is_dir()
    assert [line.split()[0] for line in names] == sorted(path.name for path in Path(folder).glob("*.yaml"))
    assert all(len(line.split()) > 3 for line in names), "a config without a title"


def test_a_file_here_goes_before_the_shipped_one(cli, capsys: pytest.CaptureFixture[str]) -> None:
    (cli.folder / "sft.yaml").write_text("model: {class_path: lit_rlhf.SFT, init_args: {model: mine}}\n")
    try:
        with pytest.raises(SystemExit):
            cli("fit", "--config=sft.yaml", "--data", "SFTData", "--data.train", "x", "--print_config")
    finally:
        (cli.folder / "sft.yaml").unlink()
    assert "model: mine" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["generate", "pairs", "best-of-n", "export"])
def test_every_option_of_a_command_is_explained(cli, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli(name, "--help")
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for option in inspect.signature(command(name)).parameters:
        explained = re.search(rf"\n        {option}: (.{{9}})", str(command(name).__doc__))
        assert f"--{option}" in shown
        assert explained is not None, option
        assert explained[1] in shown, option


def test_predict_writes_its_rows(cli, sft_run: Path) -> None:
    quiet = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
    root = ("--trainer.default_root_dir", "runs/predicted")
    cli(
        *("predict", "--model", "SFT", "--model.model", "runs/sft/model", "--model.sampling.max_new_tokens", "4"),
        *("--data", "PromptData", "--data.train", "sft.jsonl", "--data.val", "sft.jsonl", *quiet, *root),
    )
    rows = read(cli.folder / "runs" / "predicted" / "version_0" / "predictions.jsonl")
    assert [row["prompt"] for row in rows] == [f"Q{i}:" for i in range(24)]
    assert all(isinstance(row["completion"], str) for row in rows)


def test_test_reports_held_out_metrics(cli, reward_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlay = ("--config", "tiny.yaml", "--trainer.enable_progress_bar", "false", "--data.train", "pref.jsonl")
    root = ("--trainer.default_root_dir", "runs/tested")
    cli("test", "--config", "reward.yaml", *overlay, *root, "--model.model", "runs/reward/model")
    assert "accuracy" in capsys.readouterr().out


def test_the_door_of_a_checkout(cli, sft_run: Path) -> None:
    """``python cli.py`` in a process of its own: version, and a validation of a trained checkpoint."""
    version = subprocess.run([sys.executable, "cli.py", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert version.stdout == f"lit-rlhf {lit_rlhf.__version__}\n"
    result = subprocess.run(
        [
            *(sys.executable, str(ROOT / "cli.py"), "validate", "--config", "sft.yaml", "--config", "tiny.yaml"),
            *("--model.model", "base", "--data.train", "sft.jsonl", "--model.sample_prompts", "0"),
            *("--trainer.default_root_dir", "runs/validated", "--trainer.enable_progress_bar", "false"),
            *("--ckpt_path", "runs/sft/version_0/checkpoints/last.ckpt"),
        ],
        capture_output=True,
        text=True,
        cwd=cli.folder,
    )
    assert result.returncode == 0, result.stderr
    assert "val/perplexity" in result.stdout


def test_the_sft_checkpoint_with_the_best_score_is_kept(cli, reward_run: Path) -> None:
    """The overlay of docs/algorithms.md as it stands there, with three validations."""
    text = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    (overlay,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    (cli.folder / "by_score.yaml").write_text(overlay, encoding="utf-8")
    more = ("--model.sampling.max_new_tokens", "4", "--model.optim.lr", "1e-2", "--trainer.max_steps", "3")
    where = ("--trainer.default_root_dir", "runs/by_score", "--export.folder", "out/by_score")
    cli.fit(
        *("sft.yaml", "sft.jsonl", "--model.model", "base", "--config", "by_score.yaml", *more, *where),
        *("--trainer.val_check_interval", "1", "--checkpoint.save_last", "false"),
    )
    folder = cli.folder / "runs" / "by_score" / "version_0"
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        scores = [float(row["val/score"]) for row in csv.DictReader(file) if row["val/score"]]
    assert len(set(scores)) == 3
    best = 1 + max(range(3), key=lambda i: scores[i])
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"best-step={best}.ckpt"]
