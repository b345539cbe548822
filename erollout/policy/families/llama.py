"""Llama 2 and 3, and everything published in their format (SmolLM2, TinyLlama, ...)."""

from erollout.policy.families.family import Family

LLAMA = Family(
    name="llama",
    architecture_class="LlamaForCausalLM",
    add_qkv_bias=False,
    default_max_position_embeddings=2048,
    required={"attention_bias": False, "mlp_bias": False},
)
