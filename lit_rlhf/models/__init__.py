"""Networks: loaded, run, saved, given a role."""

from lit_rlhf.models.adapters import inject_adapters, load_adapters
from lit_rlhf.models.average import Average, averaged
from lit_rlhf.models.causal import (
    load_causal,
    load_tokenizer,
    next_token_logprobs,
    save_folder,
    stop_ids,
    token_logprobs,
)
from lit_rlhf.models.deferred import fill, without_weights
from lit_rlhf.models.heads import (
    load_scalar,
    response_values,
    save_scalar,
    sequence_scores,
    token_scores,
)
from lit_rlhf.models.network import Dtype, Lora, Network, fits
from lit_rlhf.models.noise import embedding_noise, uniform_noise
from lit_rlhf.models.packing import packed_next_token_logprobs
from lit_rlhf.models.roles import Reference, evaluating, forget_in_checkpoints, freeze, keep_adapters_only
from lit_rlhf.models.sharding import gathered, is_sharded, most_over_ranks, reshard, shard, unsharded_trainables
from lit_rlhf.models.sharing import can_share
from lit_rlhf.models.switches import CRITIC, POLICY, adapters_off, has_adapters, role, weights_of
from lit_rlhf.models.trunk import new_value_head, policy_and_values, shared_trunk_scores, trunk_scores, trunk_values

__all__ = [
    "CRITIC",
    "POLICY",
    "Average",
    "Dtype",
    "Lora",
    "Network",
    "Reference",
    "adapters_off",
    "averaged",
    "can_share",
    "embedding_noise",
    "evaluating",
    "fill",
    "fits",
    "forget_in_checkpoints",
    "freeze",
    "gathered",
    "has_adapters",
    "inject_adapters",
    "is_sharded",
    "keep_adapters_only",
    "load_adapters",
    "load_causal",
    "load_scalar",
    "load_tokenizer",
    "most_over_ranks",
    "new_value_head",
    "next_token_logprobs",
    "packed_next_token_logprobs",
    "policy_and_values",
    "reshard",
    "response_values",
    "role",
    "save_folder",
    "save_scalar",
    "sequence_scores",
    "shard",
    "shared_trunk_scores",
    "stop_ids",
    "token_logprobs",
    "token_scores",
    "trunk_scores",
    "trunk_values",
    "uniform_noise",
    "unsharded_trainables",
    "weights_of",
    "without_weights",
]
