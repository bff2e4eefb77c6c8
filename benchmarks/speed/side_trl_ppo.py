"""TRL 1.12's PPOTrainer on fixed work, as a process that the driver (peers.py) starts: side_trl_ppo.py WORK FOLDER.

1.12 is the last release that has it. Its optimizer steps whenever ``gradient_accumulation_steps`` microbatches are
through, whatever the minibatch: only with microbatches as large as the rollout does it step once a minibatch, as it
should; with several minibatches it is given those.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import trl.experimental.ppo.ppo_trainer as module
from datasets import Dataset
from gate import Gate
from side_trl import Seconds, Steps, policy_of, quiet
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding
from trl.experimental.ppo import PPOConfig, PPOTrainer
from work import PAD, Work, prompts, tokenizer


def count_tokens(counted: list[int]) -> None:
    """Keep the number of response tokens of each rollout, end tokens included."""
    truncate = module.truncate_response

    def counting(stop: int, pad: int, responses: Any) -> Any:
        cut = truncate(stop, pad, responses)
        counted.append(int((cut != PAD).sum()))
        return cut

    module.truncate_response = counting


def trainer_for(work: Work, folder: Path) -> Any:
    """The trainer with its four models."""
    micro = work.trl_micro if work.minibatches == 1 else work.rows
    settings = quiet(work, folder) | {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": work.rows // micro,
        "num_mini_batches": work.minibatches,
        "num_ppo_epochs": work.epochs,
        "response_length": work.response_tokens,
        "stop_token": "eos",
        "total_episodes": work.rows * work.steps,
        "local_rollout_forward_batch_size": work.rows,
        "temperature": 1.0,
        "kl_coef": work.kl_coef,
        "missing_eos_penalty": None,
        "num_sample_generations": 0,
    }

    def scalar() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32)

    words = tokenizer(work.vocabulary)
    return PPOTrainer(
        args=PPOConfig(**settings),
        processing_class=words,
        model=policy_of(work, folder),
        ref_model=policy_of(work, folder),
        reward_model=scalar(),
        value_model=scalar(),
        train_dataset=Dataset.from_dict({"input_ids": prompts(work)}),
        data_collator=DataCollatorWithPadding(words),
    )


def main(work: Work, folder: Path) -> None:
    """Train for as long as the driver lets us."""
    torch.set_num_threads(work.threads)
    gate, seconds, counted = Gate(work.burst), Seconds(), [0]
    seconds.watch(module, "batch_generation")
    count_tokens(counted)

    def report() -> dict[str, float]:
        tokens, generate = counted[-1], seconds["batch_generation"]
        seconds.clear()
        return {"tokens": tokens, "generate": generate}

    trainer = trainer_for(work, folder)
    trainer.add_callback(Steps(gate, 1, report))
    trainer.train()


if __name__ == "__main__":
    main(Work(**json.loads(sys.argv[1])), Path(sys.argv[2]))
