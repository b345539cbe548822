"""RL post-training of language models on Megatron-core, with rollouts made fast without changing what is sampled."""

__version__ = "0.1.0"
