"""Description of a decoder layer's tensors and their tensor-parallel cut. Pure.

The names and shapes of a checkpoint (architecture.py), the placements of training and decode ranks (training_layout.py,
engine/model/decode_layout.py), the decode model's layers and the drafter's follow from it. Sizes are names of Architecture's
fields, so that one description serves all models of a family.
"""

from dataclasses import dataclass
from typing import Any

from erollout.parallel.placement import Shape


@dataclass(frozen=True, slots=True)
class Part:
    """A logical tensor's module, by its name within a layer of a Hugging Face checkpoint."""

    name: str
    outputs: str
    """Size of its outputs, or of a norm."""


@dataclass(frozen=True, slots=True)
class Module:
    """A module of a layer: a norm, or a linear layer of one or several parts fused into one matrix."""

    decode: str
    """Name in a layer of the decode model."""
    training: str
    """Name in a layer of megatron-core's GPTModel."""
    parts: tuple[Part, ...]
    """Parts, in the order in which their outputs are stacked."""
    inputs: str | None = None
    """Size of the inputs; None: a norm, whose weight vector is replicated on every rank."""
    cut: str | None = None
    """Dimension cut by tensor parallelism: `outputs` or `inputs`. A linear layer with cut inputs has one part and no bias."""
    unit: str = ""
    """Unit of the cut, of which each rank holds equally many: `num_query_groups` or `ffn_hidden_size`."""
    bias: str | None = None
    """Field of Architecture that says whether there is a bias; None: never."""
    trained_by_unit: bool = False
    """Whether training stacks the parts unit by unit (a query group's queries, its key, its value), not each part whole."""

    @property
    def is_linear(self) -> bool:
        return self.inputs is not None

    def kinds(self, sizes: Any) -> tuple[str, ...]:
        """`weight`, and `bias` if there is one. `sizes`: an Architecture."""
        return ("weight", "bias") if self.bias is not None and getattr(sizes, self.bias) else ("weight",)

    def shape(self, part: Part, kind: str, sizes: Any) -> Shape:
        """Shape of a part's logical tensor. `sizes`: an Architecture."""
        outputs = getattr(sizes, part.outputs)
        return (outputs, getattr(sizes, self.inputs)) if self.inputs is not None and kind == "weight" else (outputs,)


Layer = tuple[Module, ...]
"""A layer's modules in the order of execution."""


def logical_name(layer: int, part: Part, kind: str) -> str:
    """Name of a part's weight or bias in a checkpoint."""
    return f"model.layers.{layer}.{part.name}.{kind}"


def norm(decode: str, training: str, name: str, size: str = "hidden_size") -> Module:
    """An RMSNorm over `size` features."""
    return Module(decode, training, (Part(name, size),))


def inserted(layer: Layer, after: str, *modules: Module) -> Layer:
    """The layer with further modules after the one named `after` in the decode model."""
    at = [module.decode for module in layer].index(after) + 1
    return (*layer[:at], *modules, *layer[at:])


LAYER: Layer = (
    norm("input_norm", "input_layernorm", "input_layernorm"),
    Module(
        "qkv_proj",
        "self_attention.linear_qkv",
        (
            Part("self_attn.q_proj", "query_size"),
            Part("self_attn.k_proj", "kv_size"),
            Part("self_attn.v_proj", "kv_size"),
        ),
        inputs="hidden_size",
        cut="outputs",
        unit="num_query_groups",
        bias="add_qkv_bias",
        trained_by_unit=True,
    ),
    Module(
        "o_proj",
        "self_attention.linear_proj",
        (Part("self_attn.o_proj", "hidden_size"),),
        inputs="query_size",
        cut="inputs",
        unit="num_query_groups",
    ),
    norm("post_attention_norm", "pre_mlp_layernorm", "post_attention_layernorm"),
    Module(
        "gate_up_proj",
        "mlp.linear_fc1",
        (Part("mlp.gate_proj", "ffn_hidden_size"), Part("mlp.up_proj", "ffn_hidden_size")),
        inputs="hidden_size",
        cut="outputs",
        unit="ffn_hidden_size",
    ),
    Module(
        "down_proj",
        "mlp.linear_fc2",
        (Part("mlp.down_proj", "hidden_size"),),
        inputs="ffn_hidden_size",
        cut="inputs",
        unit="ffn_hidden_size",
    ),
)
"""The layer of Llama and Qwen2: pre-norm, grouped-query attention, SwiGLU."""
