"""Supported model families, and conversion between Hugging Face configs and Architecture. Pure."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from erollout.config import ModelConfig
from erollout.configuration.hub import fetch_line
from erollout.errors import UserError
from erollout.policy.architecture import Architecture
from erollout.policy.families.family import Family, token_ids
from erollout.policy.families.llama import LLAMA
from erollout.policy.families.qwen2 import QWEN2
from erollout.policy.families.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, QWEN2, QWEN3)}


def read_architecture(config: Mapping[str, Any], source: str) -> Architecture:
    """The architecture of a Hugging Face config (config.json, or model.architecture in our YAML).

    Raises UserError, naming `source`, for an unsupported model_type and for fields that would change the logits but are not
    supported.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        raise UserError(f"{source}: model_type = {name!r} is not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[name].read(config, source)


def published_architecture(name: str) -> Architecture | None:
    """The architecture of a published model by its name: `Qwen2.5-7B`, `meta-llama/Llama-3.1-8B-Instruct`."""
    plain = _plain(name)
    matching = [
        (known, family) for family in FAMILIES.values() for known in family.published if plain.startswith(_plain(known))
    ]
    if not matching:
        return None
    known, family = max(matching, key=lambda match: len(match[0]))
    return family.published_architecture(known)


def hf_config(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """The config.json of an exported policy. `dtype`: float32 or bfloat16, that of the weights."""
    return FAMILIES[architecture.family].write(architecture, dtype)


def policy_architecture(model: ModelConfig) -> Architecture:
    """The architecture configured by `model.path` or `model.architecture`. Raises UserError.

    generation_config.json may name more end-of-sequence ids than config.json: all count.
    """
    if model.path is None:
        return _checked_length(read_architecture(model.architecture or {}, "model.architecture"), model)
    directory = Path(model.path)
    if not directory.exists():
        how = fetch_line("model.path", model.path) or "name a Hugging Face directory (config.json, safetensors, tokenizer)"
        raise UserError(f"model.path = {model.path} is not there ({directory / 'config.json'}); {how}")
    architecture = read_architecture(_read_json(directory / "config.json"), str(directory / "config.json"))
    generation = directory / "generation_config.json"
    if generation.exists():
        try:
            more = token_ids(_read_json(generation), "eos_token_id")
        except UserError as error:
            raise UserError(f"{generation}: {error}") from error
        architecture = replace(architecture, eos_token_ids=tuple(dict.fromkeys((*architecture.eos_token_ids, *more))))
    return _checked_length(architecture, model)


def _plain(name: str) -> str:
    return "".join(character for character in name.rpartition("/")[2].lower() if character.isalnum())


def _checked_length(architecture: Architecture, model: ModelConfig) -> Architecture:
    longest = model.max_position_embeddings
    if longest is not None and longest > architecture.max_position_embeddings:
        raise UserError(
            f"model.max_position_embeddings = {longest} is beyond the model's {architecture.max_position_embeddings}; lower it"
        )
    return architecture


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}; model.path must be a Hugging Face directory") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content
