"""Qwen2 and Qwen2.5: Llama with a bias on the query, key and value projections."""

from erollout.policy.families.family import Family

QWEN2 = Family(
    name="qwen2",
    architecture_class="Qwen2ForCausalLM",
    add_qkv_bias=True,
    default_max_position_embeddings=32768,
    required={"use_sliding_window": False, "use_mrope": False},
    harmless=frozenset({"sliding_window", "max_window_layers"}),  # of no effect while use_sliding_window is false
)
