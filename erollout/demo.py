"""The demo: a tokenizer, a short supervised warm-up, then reinforcement learning. Each part is a normal command."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from erollout.config import load_config
from erollout.data.tokenizer import save_character_tokenizer
from erollout.errors import UserError


def run_demo(config_path: str, warm_start_path: str, overrides: Sequence[str]) -> int:
    """Make what is not there yet, then train. Overrides go to the training. Returns the first non-zero exit status, or 0."""
    config, warm_start = load_config(config_path, list(overrides)), load_config(warm_start_path)
    if warm_start.checkpoint.export_path != config.model.path or config.model.path is None:
        raise UserError(
            f"{warm_start_path}: checkpoint.export_path = {warm_start.checkpoint.export_path} must be model.path = "
            f"{config.model.path} of {config_path}"
        )
    if not Path(config.model.path, "config.json").is_file():
        save_character_tokenizer(warm_start.tokenizer_path)
        print(f"Warm-up: {warm_start.supervised.steps} supervised steps on chain sums ({warm_start_path})", flush=True)
        if status := _run("sft", warm_start_path, []):
            return status
    print(f"Reinforcement learning: {config.train.steps} steps of GRPO ({config_path})", flush=True)
    return _run("train", config_path, overrides)


def _run(command: str, config_path: str, overrides: Sequence[str]) -> int:
    return subprocess.run([sys.executable, "-m", "erollout.cli", command, "--config", config_path, *overrides]).returncode
