"""Bytes and FLOP of a model's passes, from its architecture, what its drafters read, and the layout. Pure."""

from collections.abc import Mapping
from math import prod

from erollout.errors import UserError
from erollout.policy.architecture import Architecture
from erollout.speculation.cost.roofline import DraftWeights, ModelSize

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes per number, by dtype name."""
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
    drafters: Mapping[str, DraftWeights],
    tensor_model_parallel_size: int = 1,
    dtype: str = "bfloat16",
) -> ModelSize:
    """Bytes and FLOP of one rank's passes.

    The input embedding is looked up, not read, so it does not count, and norms are too small to count.

    Args:
        drafters: what a step of each drafter reads, by its name; see drafter/registry.py.
    """
    a, ranks, number = architecture, tensor_model_parallel_size, BYTES[dtype]
    linear = sum(
        prod(shape) for name, shape in a.logical_tensors().items() if name.startswith("model.layers.") and len(shape) == 2
    )
    head = a.vocab_size * a.hidden_size
    drafts = {
        name: (linear * _or(weights.linear, number) + head * _or(weights.head, number)) / ranks
        for name, weights in drafters.items()
    }
    return ModelSize(
        weight_bytes=(linear + head) * number / ranks,
        draft_bytes=drafts,
        flops=2.0 * (linear + head) / ranks,
        attention_flops=4.0 * a.query_size * a.num_layers / ranks,
        kv_bytes=2.0 * a.kv_size * a.num_layers * number / ranks,
        reduces=2 * a.num_layers if ranks > 1 else 0,
        reduce_bytes=float(a.hidden_size * number),
    )


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


def _or(bytes_per_weight: float | None, targets: int) -> float:
    return targets if bytes_per_weight is None else bytes_per_weight
