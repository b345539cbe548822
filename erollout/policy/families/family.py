"""Description of a model family, and reading and writing of its Hugging Face configs. Pure."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from erollout.errors import UserError
from erollout.policy.architecture import Architecture, RopeScaling
from erollout.policy.decoder import LAYER, Layer

Value = TypeVar("Value")

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
"""Hugging Face's name of each size -> Architecture's."""

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
    "pruned_heads": {},
    "partial_rotary_factor": 1,
    "rope_interleaved": False,
}
"""Fields with the only value that is supported in any family."""

_HARMLESS = {
    *("model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "name_or_path"),
    *("use_cache", "initializer_range", "pad_token_id", "pretraining_tp", "chunk_size_feed_forward", "torchscript"),
    *("output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id", "num_labels", "problem_type"),
    *("_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "transformers.js_config"),
    *("is_llama_config", "unsloth_fixed", "unsloth_version", "_flash_attn_2_enabled"),
    *("do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "num_beams"),
    *("max_length", "min_length", "max_new_tokens", "no_repeat_ngram_size", "early_stopping", "num_return_sequences"),
    *("num_beam_groups", "diversity_penalty", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
    *("begin_suppress_tokens", "exponential_decay_length_penalty", "remove_invalid_values", "forced_bos_token_id"),
    *("forced_eos_token_id", "output_scores", "return_dict_in_generate", "use_bfloat16", "tf_legacy_loss"),
    *("finetuning_task", "task_specific_params", "tokenizer_class", "prefix", "sep_token_id", "decoder_start_token_id"),
    *("tie_encoder_decoder", "is_decoder", "cross_attention_hidden_size", "max_sequence_length"),
    *("_commit_hash", "gradient_checkpointing", "use_return_dict", "low_memory", "output_past", "xla_device"),
}
"""Fields that don't affect the function from tokens to logits: generation defaults, and fields that transformers wrote into
every config (is_decoder and tie_encoder_decoder only count with an encoder)."""

_ROPE_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True, slots=True)
class PublishedSizes:
    """Sizes of a published model, from its config.json."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head: int
    vocab: int
    tied: bool
    context: int


@dataclass(frozen=True, slots=True)
class Family:
    """A `model_type` of Hugging Face, described by its differences from the others."""

    name: str
    """The `model_type`."""
    architecture_class: str
    """The only accepted entry of `architectures`, which is also written."""
    defaults: Mapping[str, int]
    """Default sizes of transformers for fields missing in a config."""
    required: Mapping[str, Any]
    """Further fields, with the only supported value."""
    add_qkv_bias: bool = False
    layer: Layer = LAYER
    """Description of a layer and its tensor-parallel cut."""
    harmless: frozenset[str] = frozenset()
    """Further fields that do not change the logits."""
    published: Mapping[str, PublishedSizes] = field(default_factory=dict)
    """Sizes of published models by prefix of their names, known before a model is fetched."""

    def read(self, config: Mapping[str, Any], source: str) -> Architecture:
        """The architecture described by a Hugging Face config. Raises UserError that names `source`."""
        problems = [problem for key, value in config.items() if value is not None and (problem := self._problem(key, value))]
        sizes = _tried(problems, self._sizes, config) or {}
        rope = _tried(problems, _rope, config, sizes.get("max_position_embeddings", 1))
        epsilon = _tried(problems, _number, config, "rms_norm_eps", 1e-6)
        tied = _tried(problems, _boolean, config, "tie_word_embeddings")
        bos, eos = (_tried(problems, token_ids, config, key) or () for key in ("bos_token_id", "eos_token_id"))
        if problems or rope is None or epsilon is None or tied is None:  # all of them, so that a config is fixed in one go
            raise UserError(f"{source}: {'; '.join(problems)}")
        return Architecture(
            family=self.name,
            **sizes,
            norm_epsilon=epsilon,
            rotary_base=rope[1],
            rope_scaling=rope[0],
            add_qkv_bias=self.add_qkv_bias,
            tie_word_embeddings=tied,
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=eos,
            layer=self.layer,
        )

    def published_architecture(self, name: str) -> Architecture:
        """The architecture of one of `published`: its tensors and its context, with defaults for other values."""
        sizes = self.published[name]
        return Architecture(
            family=self.name,
            vocab_size=sizes.vocab,
            num_layers=sizes.layers,
            hidden_size=sizes.hidden,
            ffn_hidden_size=sizes.ffn,
            num_attention_heads=sizes.heads,
            num_query_groups=sizes.groups,
            kv_channels=sizes.head,
            max_position_embeddings=sizes.context,
            add_qkv_bias=self.add_qkv_bias,
            tie_word_embeddings=sizes.tied,
            layer=self.layer,
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

    def _problem(self, key: str, value: Any) -> str | None:
        """Problem of a field that is set; None: none."""
        required = {**_REQUIRED, **self.required}
        if key == "architectures":
            right = value == [self.architecture_class] or not value
            return None if right else f"architectures = {value} is not supported; it must be [{self.architecture_class}]"
        if key in required:
            return None if value == required[key] else f"{key} = {value!r} is not supported; only {required[key]!r} is"
        if key == "layer_types":
            right = isinstance(value, list) and all(kind == "full_attention" for kind in value)
            return None if right else f"layer_types = {value!r} is not supported; only full_attention is"
        if key in _HARMLESS | self.harmless | _VALUES | _SIZES.keys():
            return None
        return f"{key} = {value!r} is unknown for {self.name}; remove it if it does not change the model"

    def _sizes(self, config: Mapping[str, Any]) -> dict[str, int]:
        problems: list[str] = []
        heads, hidden = (_tried(problems, _size, config, key, None) or 1 for key in ("num_attention_heads", "hidden_size"))
        defaults = {
            "num_attention_heads": heads,
            "hidden_size": hidden,
            "num_key_value_heads": heads,
            "head_dim": max(1, hidden // heads),
            **self.defaults,
        }
        wanted = _SIZES if not problems else {theirs: ours for theirs, ours in _SIZES.items() if theirs not in defaults}
        sizes = {ours: _tried(problems, _size, config, theirs, defaults.get(theirs)) or 1 for theirs, ours in wanted.items()}
        if not problems:
            problems = _mismatches(heads, hidden, sizes)
        if problems:
            raise UserError("; ".join(problems))
        return sizes


def _mismatches(heads: int, hidden: int, sizes: Mapping[str, int]) -> list[str]:
    """Problems of sizes that are valid singly but inconsistent."""
    groups, channels = sizes["num_query_groups"], sizes["kv_channels"]
    problems = []
    if hidden % heads:
        problems.append(f"hidden_size = {hidden} must be a multiple of num_attention_heads = {heads}")
    if heads % groups:
        problems.append(f"num_key_value_heads = {groups} must divide num_attention_heads = {heads}")
    if channels % 2:
        problems.append(f"head_dim = {channels} must be even for rotary embeddings")
    return problems


def _tried(problems: list[str], action: Callable[..., Value], *args: Any) -> Value | None:
    """The action's value; if it raises UserError, None, with the error added to the problems."""
    try:
        return action(*args)
    except UserError as error:
        problems.append(str(error))
        return None


def token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Token ids in a config's field: one, several or none. Raises UserError for anything else."""
    value = config.get(key)
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in ids):
        raise UserError(f"{key} = {value!r} must be a token id, a list of them, or null")
    return ids


def _rope(config: Mapping[str, Any], max_positions: int) -> tuple[RopeScaling | None, float]:
    """Scaling and base, from `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(field) or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{field} = {rope!r} must be a mapping")
    named = {f"{field}.{key}": value for key, value in rope.items()}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise UserError(f"{field}.rope_type = {kind!r} is not supported; only default and llama3 are")
    known = _ROPE_COMMON | set(_LLAMA3 if kind == "llama3" else ())
    for key, value in rope.items():
        if key not in known or (key == "partial_rotary_factor" and value not in (None, 1)):
            raise UserError(f"{field}.{key} = {value!r} is not supported with rope_type {kind}")
    theta = f"{field}.rope_theta" if rope.get("rope_theta") is not None else "rope_theta"
    base = _number({**config, **named}, theta, 10000.0)
    if kind == "default":
        return None, base
    factor, low, high = (_number(named, f"{field}.{key}", None) for key in _LLAMA3[:3])
    return RopeScaling(factor, low, high, _size(named, f"{field}.{_LLAMA3[3]}", max_positions)), base


def _size(config: Mapping[str, Any], key: str, default: int | None) -> int:
    value = config.get(key) if config.get(key) is not None else default
    if value is None:
        raise UserError(f"{key} is missing; a model needs it")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{key} = {value!r} must be a positive integer")
    return value


def _number(config: Mapping[str, Any], key: str, default: float | None) -> float:
    value = config.get(key) if config.get(key) is not None else default
    if value is None:
        raise UserError(f"{key} is missing; a model needs it")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{key} = {value!r} must be a positive number (1.0e-6 in YAML, not 1e-6)")
    return float(value)


def _boolean(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key) or False
    if not isinstance(value, bool):
        raise UserError(f"{key} = {value!r} must be true or false")
    return value
