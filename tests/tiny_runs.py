"""A run of the whole loop that takes seconds: an untrained character model and a scorer that varies."""

from pathlib import Path
from typing import Any

import yaml

from erollout.config import Config, build_config
from erollout.data.tokenizer import save_character_tokenizer
from erollout.tracking.journal import journal_path, read_history

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 67,  # odd: padded under tensor parallelism
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def tiny_tree(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """The configuration as nested dicts; keyword sections win over what is here."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        save_character_tokenizer(tokenizer)
    tree: dict[str, Any] = {
        "model": {"architecture": ARCHITECTURE, "tokenizer": str(tokenizer)},
        "rollout": {
            "prompts_per_step": 4,
            "group_size": 4,
            "max_prompt_tokens": 48,
            "max_tokens": 24,
            "kv_cache_gib": 0.01,
            "temperature": 1.0,
        },
        # no score is late, however busy the machine
        "rewards": {"function": "toy_scorer:share_of_digits", "timeout_seconds": 100.0},
        "data": {"kind": "chain_sum_cot", "args": {"max_terms": 4}},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 2, "max_tokens_per_micro_batch": 256, "output_dir": str(folder / "run")},
        "tracking": {"enabled": False, "figures": False},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    return tree


def tiny_config(folder: Path, **sections: dict[str, Any]) -> Config:
    return build_config(tiny_tree(folder, **sections))


def write_config(folder: Path, **sections: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(folder, **sections)))
    return path


def history(folder: Path, name: str = "run") -> list[dict[str, float]]:
    """One dict per RL step of the run in `folder`."""
    return [row for row in all_rows(folder, name) if "reward/mean" in row]


def all_rows(folder: Path, name: str = "run") -> list[dict[str, float]]:
    """Whatever was tracked: supervised steps and evaluations too."""
    return read_history(journal_path(folder / name))


def steps_recorded(folder: Path, name: str = "run") -> int:
    """Steps of any kind that a run in another process has tracked by now: 0 before its journal is there."""
    return len(all_rows(folder, name)) if journal_path(folder / name).exists() else 0


def train_here(tree: dict[str, Any]) -> None:
    """For RankPool.run: a training run on the ranks of the world that is there."""
    from erollout.training import session

    session.train(build_config(tree))


def sft_here(tree: dict[str, Any]) -> None:
    from erollout.training import session

    session.supervised(build_config(tree))


def rollout_here(tree: dict[str, Any], out: str) -> None:
    from erollout.api import sampling

    sampling.report(build_config(tree), None, out)
