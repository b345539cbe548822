"""Qwen2 and Qwen2.5: Llama with a bias on the query, key and value projections."""

from erollout.policy.families.family import Family, PublishedSizes

QWEN2 = Family(
    name="qwen2",
    architecture_class="Qwen2ForCausalLM",
    defaults={"max_position_embeddings": 32768},
    required={"use_sliding_window": False, "use_mrope": False},
    add_qkv_bias=True,
    harmless=frozenset({"sliding_window", "max_window_layers"}),  # of no effect while use_sliding_window is false
    published={
        "Qwen2.5-0.5B": PublishedSizes(24, 896, 4864, 14, 2, 64, 151936, True, 32768),
        "Qwen2.5-1.5B": PublishedSizes(28, 1536, 8960, 12, 2, 128, 151936, True, 32768),
        "Qwen2.5-3B": PublishedSizes(36, 2048, 11008, 16, 2, 128, 151936, True, 32768),
        "Qwen2.5-7B": PublishedSizes(28, 3584, 18944, 28, 4, 128, 152064, False, 32768),
        "Qwen2.5-14B": PublishedSizes(48, 5120, 13824, 40, 8, 128, 152064, False, 32768),
        "Qwen2.5-32B": PublishedSizes(64, 5120, 27648, 40, 8, 128, 152064, False, 32768),
        "Qwen2.5-72B": PublishedSizes(80, 8192, 29568, 64, 8, 128, 152064, False, 32768),
    },
)
