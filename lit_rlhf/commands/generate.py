"""Continue prompts with a model from a folder, outside training."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lit_rlhf.batch import Prompts, Rollout
from lit_rlhf.data import PromptData
from lit_rlhf.data.chat import encode_prompt, prompt_text
from lit_rlhf.models import Network, load_causal, load_tokenizer
from lit_rlhf.ranges import check_number, check_seed
from lit_rlhf.rollout import DecodeSampler, Sampling
from lit_rlhf.stages.seeds import seed_for


def read_prompts(source: str, tokenizer: str, **settings: Any) -> Iterator[Prompts]:
    """Batches of a prompt file, in its order.

    Args:
        source: file, folder or hub id, as ``PromptData`` reads it.
        tokenizer: folder or hub id.
        settings: of ``PromptData``; ``val_limit`` and ``val_batch_size`` count.
    """
    data = PromptData(source, val=source, limit=1, tokenizer=tokenizer, **settings)
    data.setup("validate")
    yield from data.val_dataloader()


def one_prompt(text: str, tokenizer: Any, chat: bool) -> Prompts:
    """A batch of a single prompt.

    Args:
        text: the prompt.
        tokenizer: the model's.
        chat: put the prompt into the tokenizer's chat template as the user's message.
    """
    prompt = [{"role": "user", "content": text}] if chat else text
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    if not ids.numel():
        raise ValueError("prompt has no tokens, so there is nothing to continue")
    return Prompts(ids, torch.ones_like(ids, dtype=torch.bool), (prompt,))


def sample(policy: Any, tokenizer: Any, batches: Iterator[Prompts], sampling: Sampling, seed: int) -> Iterator[Rollout]:
    """One rollout a batch; its number and ``seed`` decide what is drawn."""
    sampler = DecodeSampler()
    # Nothing is trained on these samples, so a filter (top-k, top-p) biases nothing.
    warnings.filterwarnings("ignore", message="sampling is filtered")
    for number, prompts in enumerate(batches):
        yield sampler(policy, tokenizer, prompts, sampling, seed=seed_for(seed, "sampling", number))


def load_policy(model: str, network: Network, device: str) -> Any:
    """Load a model for sampling only.

    Args:
        model: folder or hub id.
        network: how to hold it.
        device: "auto" (a GPU if there is one), "cpu", "cuda:1" …
    """
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_causal(model, network).requires_grad_(False).eval()
    try:
        return policy.to(auto if device == "auto" else device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device!r}: {error}; expected auto, cpu, cuda, cuda:1 …") from error


def generate(
    model: str,
    prompt: str | None = None,
    prompts: str | None = None,
    output: str | None = None,
    prompt_column: str = "prompt",
    prompt_words: int | None = None,
    chat: bool = False,
    max_prompt_length: int = 512,
    limit: int | None = None,
    samples: int = 1,
    batch_size: int = 16,
    sampling: Sampling = Sampling(),
    network: Network = Network(),
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Continue one prompt, or every prompt of a file, with a model from an exported folder.

    Args:
        model: folder or hub id.
        prompt: the one prompt.
        prompts: a file of prompts (jsonl, json, csv, parquet), a folder of such files or a hub id.
        output: write JSON lines here, with the file's other columns; to the screen as text if null.
        prompt_column: column of ``prompts`` with the prompts, text or messages.
        prompt_words: take only so many words of each prompt, from its start.
        chat: make text prompts the user's message of a conversation.
        max_prompt_length: longest prompt in tokens.
        limit: the first prompts only, so many.
        samples: continuations a prompt.
        batch_size: prompts continued at a time.
        sampling: how they are drawn; temperature 0 always takes the likeliest token.
        network: how the model is loaded.
        device: auto, cpu, cuda, cuda:1 …
        seed: the same seed gives the same texts.

    Raises:
        ValueError: neither ``prompt`` nor ``prompts`` is given, or both are.
    """
    if (prompt is None) == (prompts is None):
        raise ValueError("give either --prompt TEXT or --prompts FILE")
    check_number("samples", samples, least=1, whole=True)
    check_seed("seed", seed)
    tokenizer = load_tokenizer(model, trust_remote_code=network.trust_remote_code)
    if prompts is None:
        batches = iter([one_prompt(str(prompt), tokenizer, chat)])
    else:
        batches = read_prompts(
            prompts,
            model,
            prompt_column=prompt_column,
            prompt_words=prompt_words,
            chat=chat,
            max_prompt_length=max_prompt_length,
            val_limit=limit,
            val_batch_size=batch_size,
        )
    repeated = (batch.repeat(samples) for batch in batches)
    rows = written(sample(load_policy(model, network, device), tokenizer, repeated, sampling, seed))
    if output is None:
        bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
        for row in rows:
            print(f"{prompt_text(row['prompt'])}{bold}{row['completion']}{plain}\n")
    else:
        print(f"wrote {write_rows(rows, output)} completions to {output}")


def written(rollouts: Iterator[Rollout]) -> Iterator[dict[str, Any]]:
    """Rows of rollouts as a file holds them: the dataset's columns, prompt, completion, and whether it ended."""
    for rollout in rollouts:
        for i, (prompt, text, ended) in enumerate(
            zip(rollout.prompts, rollout.completions, rollout.ended.tolist(), strict=True)
        ):
            columns = {key: column[i] for key, column in rollout.columns.items()}
            yield {**columns, "prompt": prompt, "completion": text, "ended": ended}


def write_rows(rows: Iterator[dict[str, Any]], path: str) -> int:
    """Write JSON lines, each as soon as it is there.

    Args:
        rows: what to write.
        path: the file; its folder is made if missing.

    Returns:
        How many rows.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with Path(path).open("w", encoding="utf-8") as file:
        for count, row in enumerate(rows, start=1):  # noqa: B007 - the count is what is returned
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count
