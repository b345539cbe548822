"""What a decoder-only transformer is made of: the facts that training, decoding and conversion all need. Pure."""

from dataclasses import dataclass
from math import prod

from erollout.parallel.placement import Shape


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's frequency-dependent rope scaling (`rope_type: llama3` in a Hugging Face config)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes of a pre-norm, SwiGLU, RMSNorm, rotary, grouped-query decoder (Llama 2/3, Qwen2/2.5)."""

    family: str
    """A name in policy/families: `llama` or `qwen2`."""
    vocab_size: int
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads."""
    kv_channels: int
    """Size of one head."""
    max_position_embeddings: int
    norm_epsilon: float = 1e-6
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    add_qkv_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_size(self) -> int:
        return self.num_query_groups * self.kv_channels

    def logical_tensors(self) -> dict[str, Shape]:
        """Name and shape of every weight, as a Hugging Face checkpoint of this architecture has them, in its order."""
        h, f = self.hidden_size, self.ffn_hidden_size
        tensors: dict[str, Shape] = {"model.embed_tokens.weight": (self.vocab_size, h)}
        for layer in range(self.num_layers):
            at = f"model.layers.{layer}"
            rows = {"q_proj": self.query_size, "k_proj": self.kv_size, "v_proj": self.kv_size}
            for name, size in rows.items():
                tensors[f"{at}.self_attn.{name}.weight"] = (size, h)
                if self.add_qkv_bias:
                    tensors[f"{at}.self_attn.{name}.bias"] = (size,)
            tensors[f"{at}.self_attn.o_proj.weight"] = (h, self.query_size)
            tensors[f"{at}.mlp.gate_proj.weight"] = (f, h)
            tensors[f"{at}.mlp.up_proj.weight"] = (f, h)
            tensors[f"{at}.mlp.down_proj.weight"] = (h, f)
            tensors[f"{at}.input_layernorm.weight"] = (h,)
            tensors[f"{at}.post_attention_layernorm.weight"] = (h,)
        tensors["model.norm.weight"] = (h,)
        if not self.tie_word_embeddings:
            tensors["lm_head.weight"] = (self.vocab_size, h)
        return tensors

    def num_parameters(self) -> int:
        return sum(prod(shape) for shape in self.logical_tensors().values())
