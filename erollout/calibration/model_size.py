"""Bytes and FLOP of a model's passes, from its architecture, the drafters' formats and the layout. Pure."""

from collections.abc import Iterable
from dataclasses import replace
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


def known_model(name: str) -> Architecture | None:
    """The architecture of a published model by its name: `Qwen2.5-7B`, `meta-llama/Llama-3.1-8B-Instruct`."""
    plain = _plain(name)
    for known in sorted(_KNOWN, key=len, reverse=True):
        if plain.startswith(_plain(known)):
            return parse_shape(_KNOWN[known])
    return None


def published_model(name: str) -> Architecture | None:
    """The architecture as from `known_model`, with family, context length and biases."""
    architecture = known_model(name)
    if architecture is None:
        return None
    family, context, has_bias = next(found for start, found in _FAMILIES.items() if _plain(name).startswith(start))
    return replace(architecture, family=family, max_position_embeddings=context, add_qkv_bias=has_bias)


def _plain(name: str) -> str:
    return "".join(character for character in name.rpartition("/")[2].lower() if character.isalnum())


def _row(layers: int, hidden: int, ffn: int, heads: int, groups: int, head: int, vocab: int, tied: int) -> str:
    return f"{layers=} {hidden=} {ffn=} {heads=} {groups=} {head=} {vocab=} {tied=}"


_FAMILIES = {
    "qwen25": ("qwen2", 32768, True),
    "llama3": ("llama", 131072, False),
    "smollm2": ("llama", 8192, False),
}
"""Family, context length and whether queries, keys and values have a bias, by prefix of a name."""
_KNOWN = {
    "Qwen2.5-0.5B": _row(24, 896, 4864, 14, 2, 64, 151936, 1),
    "Qwen2.5-1.5B": _row(28, 1536, 8960, 12, 2, 128, 151936, 1),
    "Qwen2.5-3B": _row(36, 2048, 11008, 16, 2, 128, 151936, 1),
    "Qwen2.5-7B": _row(28, 3584, 18944, 28, 4, 128, 152064, 0),
    "Qwen2.5-14B": _row(48, 5120, 13824, 40, 8, 128, 152064, 0),
    "Qwen2.5-32B": _row(64, 5120, 27648, 40, 8, 128, 152064, 0),
    "Qwen2.5-72B": _row(80, 8192, 29568, 64, 8, 128, 152064, 0),
    "Llama-3.2-1B": _row(16, 2048, 8192, 32, 8, 64, 128256, 1),
    "Llama-3.2-3B": _row(28, 3072, 8192, 24, 8, 128, 128256, 1),
    "Llama-3.1-8B": _row(32, 4096, 14336, 32, 8, 128, 128256, 0),
    "Llama-3.1-70B": _row(80, 8192, 28672, 64, 8, 128, 128256, 0),
    "SmolLM2-135M": _row(30, 576, 1536, 9, 3, 64, 49152, 1),
    "SmolLM2-360M": _row(32, 960, 2560, 15, 5, 64, 49152, 1),
    "SmolLM2-1.7B": _row(24, 2048, 8192, 32, 32, 64, 49152, 1),
}
"""Sizes of published models, from their config.json."""
