"""What a family of models says about itself, and the reading and writing of Hugging Face configs by it. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from erollout.errors import UserError
from erollout.policy.architecture import Architecture, RopeScaling

_SIZES = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
}
"""Hugging Face's name of each size: Architecture's."""

_VALUES = {
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
}

_REQUIRED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "partial_rotary_factor": 1,
    "rope_interleaved": False,
}
"""Fields whose other values no family here computes."""

_HARMLESS = {
    *("model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "name_or_path"),
    *("use_cache", "initializer_range", "pad_token_id", "pretraining_tp", "chunk_size_feed_forward", "torchscript"),
    *("output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id", "num_labels", "problem_type"),
    *("_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "transformers.js_config"),
    *("is_llama_config", "unsloth_fixed", "unsloth_version", "_flash_attn_2_enabled"),
    *("do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "num_beams"),
    *("max_length", "min_length", "max_new_tokens", "no_repeat_ngram_size", "early_stopping", "num_return_sequences"),
}
"""Fields that say nothing about the function from tokens to logits."""

_ROPE_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type` of Hugging Face, as far as it differs from the others."""

    name: str
    """The `model_type`."""
    architecture_class: str
    """The one entry of `architectures` that is accepted and written."""
    add_qkv_bias: bool
    default_max_position_embeddings: int
    required: Mapping[str, Any]
    """Further fields, with the only value that is computed."""
    harmless: frozenset[str] = frozenset()
    """Further fields that do not change the logits."""

    def read(self, config: Mapping[str, Any], source: str) -> Architecture:
        """The architecture that a Hugging Face config describes. Raises UserError; `source` is named in the message."""
        self._refuse_unsupported(config, source)
        sizes = self._sizes(config, source)
        scaling, base = _rope(config, sizes["max_position_embeddings"], source)
        return Architecture(
            family=self.name,
            **sizes,
            norm_epsilon=_number(config, "rms_norm_eps", 1e-6, source),
            rotary_base=base,
            rope_scaling=scaling,
            add_qkv_bias=self.add_qkv_bias,
            tie_word_embeddings=_boolean(config, "tie_word_embeddings", source),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=token_ids(config.get("eos_token_id")),
        )

    def write(self, architecture: Architecture, dtype: str) -> dict[str, Any]:
        """The config of an architecture, in the spelling that transformers 4 and 5 both read."""
        eos = architecture.eos_token_ids
        scaling = architecture.rope_scaling
        return {
            "architectures": [self.architecture_class],
            "model_type": self.name,
            **{theirs: getattr(architecture, ours) for theirs, ours in _SIZES.items()},
            "rms_norm_eps": architecture.norm_epsilon,
            "rope_theta": architecture.rotary_base,
            "rope_scaling": {"rope_type": "llama3"} | {key: getattr(scaling, key) for key in _LLAMA3} if scaling else None,
            "tie_word_embeddings": architecture.tie_word_embeddings,
            "bos_token_id": architecture.bos_token_id,
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
            "hidden_act": "silu",
            **self.required,
            "torch_dtype": dtype,
        }

    def _refuse_unsupported(self, config: Mapping[str, Any], source: str) -> None:
        classes = config.get("architectures") or [self.architecture_class]
        if list(classes) != [self.architecture_class]:
            raise UserError(f"{source}: architectures = {classes} is not supported; it must be [{self.architecture_class}]")
        required = {**_REQUIRED, **self.required}
        for key, value in config.items():
            if key in required:
                if value is not None and value != required[key]:
                    raise UserError(f"{source}: {key} = {value!r} is not supported; only {required[key]!r} is")
            elif key == "layer_types":
                if any(kind != "full_attention" for kind in value or ()):
                    raise UserError(f"{source}: layer_types = {value!r} is not supported; only full_attention is")
            elif value is not None and key not in _HARMLESS | self.harmless | _VALUES | _SIZES.keys():
                raise UserError(
                    f"{source}: {key} = {value!r} is unknown for {self.name}; remove it if it does not change the model"
                )

    def _sizes(self, config: Mapping[str, Any], source: str) -> dict[str, int]:
        heads, hidden = (_size(config, key, None, source) for key in ("num_attention_heads", "hidden_size"))
        if hidden % heads:
            raise UserError(f"{source}: hidden_size = {hidden} must be a multiple of num_attention_heads = {heads}")
        defaults = {
            "num_key_value_heads": heads,
            "head_dim": hidden // heads,
            "max_position_embeddings": self.default_max_position_embeddings,
        }
        sizes = {ours: _size(config, theirs, defaults.get(theirs), source) for theirs, ours in _SIZES.items()}
        if heads % sizes["num_query_groups"]:
            groups = sizes["num_query_groups"]
            raise UserError(f"{source}: num_key_value_heads = {groups} must divide num_attention_heads = {heads}")
        if sizes["kv_channels"] % 2:
            raise UserError(f"{source}: head_dim = {sizes['kv_channels']} must be even for rotary embeddings")
        return sizes


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """A config's token id field: one, several or none."""
    return () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _rope(config: Mapping[str, Any], max_positions: int, source: str) -> tuple[RopeScaling | None, float]:
    """Scaling and base, from `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(field) or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{source}: {field} = {rope!r} must be a mapping")
    named = {f"{field}.{key}": value for key, value in rope.items()}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise UserError(f"{source}: {field}.rope_type = {kind!r} is not supported; only default and llama3 are")
    known = _ROPE_COMMON | set(_LLAMA3 if kind == "llama3" else ())
    for key, value in rope.items():
        if key not in known or (key == "partial_rotary_factor" and value not in (None, 1)):
            raise UserError(f"{source}: {field}.{key} = {value!r} is not supported with rope_type {kind}")
    theta = f"{field}.rope_theta" if rope.get("rope_theta") is not None else "rope_theta"
    base = _number({**config, **named}, theta, 10000.0, source)
    if kind == "default":
        return None, base
    factor, low, high = (_number(named, f"{field}.{key}", None, source) for key in _LLAMA3[:3])
    return RopeScaling(factor, low, high, _size(named, f"{field}.{_LLAMA3[3]}", max_positions, source)), base


def _size(config: Mapping[str, Any], key: str, default: int | None, source: str) -> int:
    value = config.get(key) if config.get(key) is not None else default
    if value is None:
        raise UserError(f"{source}: {key} is missing; a model needs it")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{source}: {key} = {value!r} must be a positive integer")
    return value


def _number(config: Mapping[str, Any], key: str, default: float | None, source: str) -> float:
    value = config.get(key) if config.get(key) is not None else default
    if value is None:
        raise UserError(f"{source}: {key} is missing; a model needs it")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise UserError(f"{source}: {key} = {value!r} must be a positive number (1.0e-6 in YAML, not 1e-6)")
    return float(value)


def _boolean(config: Mapping[str, Any], key: str, source: str) -> bool:
    value = config.get(key) or False
    if not isinstance(value, bool):
        raise UserError(f"{source}: {key} = {value!r} must be true or false")
    return value
