"""Samplers: policy, prompts and settings in, rollout out."""

from lit_rlhf.rollout.decode import DecodeSampler
from lit_rlhf.rollout.generate import GenerateSampler
from lit_rlhf.rollout.sampling import Sampler, Sampling

__all__ = ["DecodeSampler", "GenerateSampler", "Sampler", "Sampling"]
