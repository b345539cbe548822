"""Architecture of a decoder-only transformer, for training, decoding and conversion. Pure."""

from dataclasses import dataclass, field
from math import prod

from erollout.parallel.placement import Shape
from erollout.policy.decoder import LAYER, Layer, logical_name

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


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
    """Name of the family in policy/families."""
    vocab_size: int
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Number of key/value heads."""
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
    layer: Layer = field(default=LAYER, repr=False)
    """Description of a layer, from the family."""

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_size(self) -> int:
        return self.num_query_groups * self.kv_channels

    def has(self, module: str) -> bool:
        """Whether a layer has a module of this name in the decode model."""
        return any(mine.decode == module for mine in self.layer)

    def logical_tensors(self) -> dict[str, Shape]:
        """Name and shape of every weight in a Hugging Face checkpoint of this architecture, in its order."""
        tensors: dict[str, Shape] = {EMBEDDING: (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_layers):
            for module in sorted(
                self.layer, key=lambda module: "." not in module.parts[0].name
            ):  # the hidden states' norms last
                for part in module.parts:
                    for kind in module.kinds(self):
                        tensors[logical_name(layer, part, kind)] = module.shape(part, kind, self)
        tensors[FINAL_NORM] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            tensors[OUTPUT] = (self.vocab_size, self.hidden_size)
        return tensors

    def num_parameters(self) -> int:
        return sum(prod(shape) for shape in self.logical_tensors().values())
