"""Fixed work for both sides of a comparison: weights, prompts, sequences and response lengths, made on the spot.

It imports torch and transformers only, so that the peers' environments can use it.

**How response lengths are set.** A random policy does not end its responses in any wanted way, so the end token's
logit is made a function of the position: out of reach for ``full`` responses, else such that the chance of ending at
token n, not having ended before, is 1 / (longest − n + 1) from the shortest length on, and the length is uniform. The
policy itself is changed, not the sampling: one dimension of the last hidden state carries the wanted logit (a hook on
the final norm writes it there) and the head reads that dimension for the end token only. So all logits of a position
are the same in sampling, scoring and training, however an engine computes them, and each side samples the ends as it
would a trained policy's: rows may leave the batch or be drawn in any order. The mean length is equal on both sides up
to sampling noise; the token counts are reported beside the seconds. Prompts are equally long and padding is on the
right, so that a position tells the token's number. Sequences of SFT and reward model come ready-made: their lengths
are the even quantiles of the range in random order, hence the same tokens in every batch.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PAD, EOS, BOS = 0, 1, 2
NEVER = -30.0  # a logit out of reach
END_SLOT, PAD_SLOT = 0, 1  # dimensions of the last hidden state that carry the logits of EOS and PAD

SHAPES: dict[str, dict[str, int]] = {  # llama, tied embeddings
    "toy": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"intermediate_size": 64, "vocab_size": 259},
    "1m": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"intermediate_size": 352, "vocab_size": 1024},
    "15m": {"hidden_size": 288, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6}
    | {"intermediate_size": 768, "vocab_size": 32_000},
}


@dataclass(frozen=True)
class Work:
    """What one step does, and how often it is done.

    Args:
        task: grpo, rloo, ppo, sft, reward, loop_sft or loop_grpo.
        shape: of the model, a key of ``SHAPES``.
        lengths: full = every sequence as long as allowed, ragged = uniform from an eighth of that.
        rows: prompts, sequences or pairs a step.
        group: responses a prompt.
        epochs: passes over each rollout.
        minibatches: optimizer steps a pass.
        micro: sequences a forward pass of TRL's updates; this project cuts its own by tokens.
        prompt_tokens: length of every prompt.
        response_tokens: longest response.
        sequence_tokens: longest sequence of SFT and reward model.
        kl_coef: weight of the KL to the reference.
        lr: learning rate; small, so that the model stays as it is.
        steps: how often, warm-up included.
        burst: steps between two looks at the clock.
        threads: of torch.
    """

    task: str
    shape: str = "1m"
    lengths: str = "full"
    rows: int = 64
    group: int = 1
    epochs: int = 1
    minibatches: int = 1
    micro: int = 64
    prompt_tokens: int = 32
    response_tokens: int = 64
    sequence_tokens: int = 128
    kl_coef: float = 0.04
    lr: float = 1e-6
    steps: int = 6
    burst: int = 1
    threads: int = 1

    @property
    def vocabulary(self) -> int:
        """Tokens that there are."""
        return SHAPES[self.shape]["vocab_size"]

    @property
    def trl_micro(self) -> int:
        """Sequences a forward pass of TRL's updates."""
        return min(self.micro, self.sequences)

    @property
    def sequences(self) -> int:
        """Responses a step."""
        return self.rows * self.group


def tokenizer(vocabulary: int) -> Any:
    """Make a tokenizer of one word a token: 0 to 2 are pad, eos and bos, then ``w3``, ``w4`` and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS} | {f"w{i}": i for i in range(3, vocabulary)}
    words_to_ids = Tokenizer(models.WordLevel(words, unk_token="w3"))
    words_to_ids.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    return PreTrainedTokenizerFast(tokenizer_object=words_to_ids, padding_side="left", **special)


def save_models(shape: str, folder: Path) -> None:
    """Write a language model and a reward model of random weights, with the tokenizer: ``policy`` and ``reward``."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    ends = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
    common: dict[str, Any] = {"max_position_embeddings": 512, "tie_word_embeddings": True} | ends
    for name, kind, extra in (
        ("policy", LlamaForCausalLM, {}),
        ("reward", LlamaForSequenceClassification, {"num_labels": 1}),
    ):
        torch.manual_seed(0)
        model = kind(LlamaConfig(**SHAPES[shape], **common, **extra))
        if name == "policy":
            reserve_slots(model)
        model.save_pretrained(folder / name)
        tokenizer(SHAPES[shape]["vocab_size"]).save_pretrained(folder / name)


def prompts(work: Work) -> list[list[int]]:
    """Random prompts for all steps, as token ids."""
    draw = random.Random(0)
    count = work.rows * work.steps
    return [[draw.randrange(3, work.vocabulary) for _ in range(work.prompt_tokens)] for _ in range(count)]


def sequences(work: Work, seed: int = 0) -> list[list[int]]:
    """Random sequences for all steps, as token ids; the lengths of every batch sum to the same."""
    draw = random.Random(seed)
    longest, shortest = work.sequence_tokens, work.sequence_tokens // 8
    even = [shortest + round(i * (longest - shortest) / max(work.rows - 1, 1)) for i in range(work.rows)]
    rows = []
    for _ in range(work.steps):
        lengths = [longest] * work.rows if work.lengths == "full" else draw.sample(even, len(even))
        rows += [[draw.randrange(3, work.vocabulary) for _ in range(length)] for length in lengths]
    return rows


def pairs(work: Work) -> tuple[list[list[int]], list[list[int]]]:
    """Random chosen and rejected sequences for all steps; the two of a pair begin with the same prompt, as pairs do."""
    chosen, rejected = sequences(work, seed=0), sequences(work, seed=1)
    for one, other in zip(chosen, rejected, strict=True):
        prompt = min(work.prompt_tokens, len(one) - 1, len(other) - 1)
        other[:prompt] = one[:prompt]
    return chosen, rejected


def end_logit(number: int, work: Work) -> float:
    """Logit of the end token at the response's ``number``-th token, from 1; the other logits are about N(0, σ²)."""
    longest, shortest = work.response_tokens, work.response_tokens // 8
    if work.lengths == "full" or number < shortest:
        return NEVER
    if number >= longest:
        return -NEVER
    odds = 1.0 / (longest - number)  # of ending here, to going on: h / (1 − h) with h = 1 / (longest − number + 1)
    variance = SHAPES[work.shape]["hidden_size"] * 0.02**2  # unit rows by weights of standard deviation 0.02
    return math.log(odds) + math.log(work.vocabulary - 2) + variance / 2


@torch.no_grad()
def reserve_slots(policy: Any) -> None:
    """Have the head read two dimensions for EOS and PAD only, and those tokens' logits from nothing else."""
    weight = policy.lm_head.weight
    weight[:, [END_SLOT, PAD_SLOT]] = 0.0
    weight[[EOS, PAD]] = 0.0
    weight[EOS, END_SLOT] = weight[PAD, PAD_SLOT] = 1.0


def end_by_position(policy: Any, work: Work) -> None:
    """Have a llama end its responses as the work says, in every forward pass from now on.

    Args:
        policy: loaded from the folder that `save_models` wrote.
        work: says how long prompts and responses are.
    """
    numbers = range(2 - work.prompt_tokens, work.response_tokens + 1)  # position 0 precedes token 2 − prompt_tokens
    slots = torch.tensor([[end_logit(number, work), NEVER] for number in numbers])  # PAD never: TRL's PPO ends there
    positions = torch.zeros(1, 1, dtype=torch.long)

    def note_positions(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal positions
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

    def fill_slots(module: Any, args: tuple[Any, ...], hidden: torch.Tensor) -> torch.Tensor:
        wanted = slots[positions.clamp(max=len(slots) - 1)].expand(*hidden.shape[:2], -1)
        return torch.cat([wanted, hidden[..., 2:]], dim=-1)

    policy.model.rotary_emb.register_forward_pre_hook(note_positions, with_kwargs=True)
    policy.model.norm.register_forward_hook(fill_slots)


class CountingReward:
    """Share of even token ids in a response; it also counts the response tokens that it sees."""

    __name__ = "even_ids"
    name = "even_ids"

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Judge token ids [B]."""
        self.tokens += sum(map(len, completion_ids))
        return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]
