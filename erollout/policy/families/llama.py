"""Llama 2 and 3, and everything published in their format (SmolLM2, TinyLlama, ...)."""

from erollout.policy.families.family import Family, PublishedSizes

LLAMA = Family(
    name="llama",
    architecture_class="LlamaForCausalLM",
    defaults={"max_position_embeddings": 2048},
    required={"attention_bias": False, "mlp_bias": False},
    published={
        "Llama-3.2-1B": PublishedSizes(16, 2048, 8192, 32, 8, 64, 128256, True, 131072),
        "Llama-3.2-3B": PublishedSizes(28, 3072, 8192, 24, 8, 128, 128256, True, 131072),
        "Llama-3.1-8B": PublishedSizes(32, 4096, 14336, 32, 8, 128, 128256, False, 131072),
        "Llama-3.1-70B": PublishedSizes(80, 8192, 28672, 64, 8, 128, 128256, False, 131072),
        "SmolLM2-135M": PublishedSizes(30, 576, 1536, 9, 3, 64, 49152, True, 8192),
        "SmolLM2-360M": PublishedSizes(32, 960, 2560, 15, 5, 64, 49152, True, 8192),
        "SmolLM2-1.7B": PublishedSizes(24, 2048, 8192, 32, 32, 64, 49152, True, 8192),
    },
)
