"""Bytes and FLOP of a model's passes, from its architecture, the drafters' formats and the layout. Pure."""

from collections.abc import Iterable
from math import prod

from erollout.errors import UserError
from erollout.policy.architecture import Architecture
from erollout.speculation.cost.roofline import ModelSize

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes per number, by dtype name."""
_BITS = {"w4": 4, "w8": 8, "fp8": 8, "int4": 4, "int8": 8}
"""Bits per weight, by prefix of a format's name."""
_SHAPE = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "heads": "num_attention_heads",
    "groups": "num_query_groups",
    "head": "kv_channels",
    "vocab": "vocab_size",
}
"""Keys of an architecture's description, and the fields they stand for."""


def model_size(
    architecture: Architecture,
    formats: Iterable[str],
    tensor_model_parallel_size: int = 1,
    dtype: str = "bfloat16",
    group_size: int = 128,
    lm_head: str = "target",
) -> ModelSize:
    """Bytes and FLOP of one rank's passes.

    The input embedding is looked up, not read, so it does not count. Every drafter shares the target's embedding and norms, and
    its LM head unless `lm_head` is "w8a8".

    Args:
        formats: formats of the drafters; one with "+head" has an INT8 LM head. Raises UserError for unknown names.
        group_size: number of weights that share a scale in 4-bit formats.
    """
    a, ranks, number = architecture, tensor_model_parallel_size, BYTES[dtype]
    linear = sum(
        prod(shape) for name, shape in a.logical_tensors().items() if name.startswith("model.layers.") and len(shape) == 2
    )
    head = a.vocab_size * a.hidden_size
    drafts = {}
    for format in formats:
        head_bytes = head * (1 if lm_head == "w8a8" or "+head" in format else number)
        drafts[format] = (linear * weight_bytes(format, number, group_size) + head_bytes) / ranks
    return ModelSize(
        weight_bytes=(linear + head) * number / ranks,
        draft_bytes=drafts,
        flops=2.0 * (linear + head) / ranks,
        attention_flops=4.0 * a.query_size * a.num_layers / ranks,
        kv_bytes=2.0 * a.kv_size * a.num_layers * number / ranks,
        reduces=2 * a.num_layers if ranks > 1 else 0,
        reduce_bytes=float(a.hidden_size * number),
    )


def weight_bytes(format: str, number: int = 2, group_size: int = 128) -> float:
    """Bytes per weight of a drafter's linear layer, including its share of the scales. Raises UserError for unknown names."""
    if format.startswith("none"):
        return number
    bits = next((bits for name, bits in _BITS.items() if format.startswith(name)), 4 if format.startswith("auto") else None)
    if bits is None:
        raise UserError(f"drafter format {format!r} is unknown: its name begins with one of {', '.join(_BITS)}")
    scales = (2.0 if bits == 4 else 0.0) + (2.0 if "asym" in format else 0.0)
    return bits / 8 + scales / group_size


def describe_shape(architecture: Architecture) -> str:
    """The sizes that identify a model in a calibration: `layers=30 hidden=576 ...`. Its weights don't matter."""
    words = [f"{word}={getattr(architecture, name)}" for word, name in _SHAPE.items()]
    return " ".join([*words, f"tied={int(architecture.tie_word_embeddings)}"])


def parse_shape(text: str) -> Architecture:
    """The inverse of `describe_shape`: an architecture with these sizes and defaults for the rest. Raises UserError."""
    try:
        words = {word: int(value) for word, _, value in (part.partition("=") for part in text.split())}
        sizes = {name: words[word] for word, name in _SHAPE.items()}
        return Architecture("", max_position_embeddings=0, tie_word_embeddings=bool(words["tied"]), **sizes)  # type: ignore[arg-type]
    except (KeyError, ValueError):
        form = " ".join(f"{word}=N" for word in (*_SHAPE, "tied"))
        raise UserError(f"architecture {text!r} is not of the form {form}") from None
