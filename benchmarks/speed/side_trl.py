"""TRL 1.16 on fixed work, as a process that the driver (peers.py) starts: side_trl.py WORK FOLDER.

GRPOTrainer, RLOOTrainer, SFTTrainer and RewardTrainer with the settings that make their mathematics the stages' own;
what only reports (tables of completions, logs, progress bars) is off where TRL has a switch for it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from gate import Gate
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from work import CountingReward, Work, end_by_position, pairs, prompts, sequences, tokenizer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


class Seconds(Counter[str]):
    """Wall-clock seconds spent in methods, by name."""

    def watch(self, owner: Any, method: str) -> None:
        """Time a method of an object or module from now on."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self[method] += time.perf_counter() - started

        setattr(owner, method, timed)


class Steps(TrainerCallback):
    """Passes the gate after every rollout's last optimizer step.

    Args:
        gate: the pipe to the driver.
        every: optimizer steps a rollout.
        report: gives what ``Gate.done`` wants, and forgets it.
    """

    def __init__(self, gate: Gate, every: int, report: Any) -> None:
        self.gate, self.every, self.report = gate, every, report

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Everything is loaded."""
        self.gate.ready("trl", "accelerate")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An optimizer step has been made."""
        if state.global_step % self.every == 0:
            self.gate.done(**self.report())


def quiet(work: Work, folder: Path) -> dict[str, Any]:
    """Settings of every trainer."""
    return {
        "output_dir": str(folder / "out"),
        "learning_rate": work.lr,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }


def policy_of(work: Work, folder: Path) -> Any:
    """The language model, whose responses end as the work says."""
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    end_by_position(model, work)
    return model


def online(work: Work, folder: Path, gate: Gate) -> Any:
    """GRPOTrainer or RLOOTrainer."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    settings = quiet(work, folder) | {
        "per_device_train_batch_size": work.trl_micro,
        "gradient_accumulation_steps": work.sequences // work.trl_micro,
        "num_generations": work.group,
        "max_completion_length": work.response_tokens,
        "num_iterations": work.epochs,
        "beta": work.kl_coef,
        "max_steps": work.steps * work.epochs,
        "temperature": 1.0,
        "shuffle_dataset": False,
    }
    trainer_type: Any = RLOOTrainer
    config: Any = RLOOConfig
    if work.task == "grpo":
        trainer_type, config = GRPOTrainer, GRPOConfig
        settings |= {"loss_type": "grpo", "scale_rewards": "group"}
    texts = [" ".join(f"w{i}" for i in ids) for ids in prompts(work)]
    reward, seconds = CountingReward(), Seconds()
    trainer = trainer_type(
        model=policy_of(work, folder),
        args=config(**settings),
        processing_class=tokenizer(work.vocabulary),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        reward_funcs=reward,
    )
    end_by_position(trainer.ref_model, work)
    seconds.watch(trainer, "_generate")
    seconds.watch(trainer, "_generate_and_score_completions")
    seconds.watch(trainer, "training_step")

    def report() -> dict[str, float]:
        both, generate = seconds["_generate_and_score_completions"], seconds["_generate"]
        update = seconds["training_step"] - both  # without the optimizer's own step
        tokens, reward.tokens = reward.tokens, 0
        seconds.clear()
        return {"tokens": tokens, "generate": generate, "score": both - generate, "update": update}

    trainer.add_callback(Steps(gate, work.epochs, report))
    return trainer


def offline(work: Work, folder: Path, gate: Gate) -> Any:
    """SFTTrainer or RewardTrainer; batches in the order of the rows."""
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    settings = quiet(work, folder) | {
        "per_device_train_batch_size": work.rows,
        "max_steps": work.steps,
        "max_length": work.sequence_tokens,
        "train_sampling_strategy": "sequential",
    }
    if work.task == "sft":
        rows = sequences(work)
        trainer: Any = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32),
            args=SFTConfig(**settings, dataset_kwargs={"skip_prepare_dataset": True}),
            processing_class=tokenizer(work.vocabulary),
            train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        )
    else:
        columns = dict(zip(("chosen_ids", "rejected_ids"), pairs(work), strict=True))
        trainer = RewardTrainer(
            model=AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32),
            args=RewardConfig(**settings),
            processing_class=tokenizer(work.vocabulary),
            train_dataset=Dataset.from_dict(columns),
        )
    tokens, step = [0], trainer.training_step

    def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        tokens[0] = int(inputs["attention_mask"].sum())
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = counted
    trainer.add_callback(Steps(gate, 1, lambda: {"tokens": tokens[0]}))
    return trainer


def main(work: Work, folder: Path) -> None:
    """Train for as long as the driver lets us."""
    torch.set_num_threads(work.threads)
    gate = Gate(work.burst)
    make = online if work.task in ("grpo", "rloo") else offline
    make(work, folder, gate).train()


if __name__ == "__main__":
    main(Work(**json.loads(sys.argv[1])), Path(sys.argv[2]))
