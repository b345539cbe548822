"""Qwen3, dense: Llama with heads of a size of their own and an RMSNorm over each query and key head before the rotation."""

from erollout.policy.decoder import LAYER, inserted, norm
from erollout.policy.families.family import Family, PublishedSizes

QWEN3 = Family(
    name="qwen3",
    architecture_class="Qwen3ForCausalLM",
    defaults={"max_position_embeddings": 32768, "head_dim": 128},
    required={"attention_bias": False, "use_sliding_window": False},
    layer=inserted(
        LAYER,
        "qkv_proj",
        norm("q_norm", "self_attention.q_layernorm", "self_attn.q_norm", "kv_channels"),
        norm("k_norm", "self_attention.k_layernorm", "self_attn.k_norm", "kv_channels"),
    ),
    harmless=frozenset({"sliding_window", "max_window_layers"}),  # of no effect while use_sliding_window is false
    published={
        "Qwen3-0.6B": PublishedSizes(28, 1024, 3072, 16, 8, 128, 151936, True, 40960),
        "Qwen3-1.7B": PublishedSizes(28, 2048, 6144, 16, 8, 128, 151936, True, 40960),
        "Qwen3-4B": PublishedSizes(36, 2560, 9728, 32, 8, 128, 151936, True, 40960),
        "Qwen3-4B-Instruct-2507": PublishedSizes(36, 2560, 9728, 32, 8, 128, 151936, True, 262144),
        "Qwen3-4B-Thinking-2507": PublishedSizes(36, 2560, 9728, 32, 8, 128, 151936, True, 262144),
        "Qwen3-8B": PublishedSizes(36, 4096, 12288, 32, 8, 128, 151936, False, 40960),
        "Qwen3-14B": PublishedSizes(40, 5120, 17408, 40, 8, 128, 151936, False, 40960),
        "Qwen3-32B": PublishedSizes(64, 5120, 25600, 64, 8, 128, 151936, False, 40960),
    },
)
