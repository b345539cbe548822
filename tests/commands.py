"""The `erollout` command in tests: inside this process, on a warm rank, or as a real process."""

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from tiny_runs import ARCHITECTURE

from erollout.cli import main
from erollout.data.tokenizer import save_character_tokenizer
from erollout.policy.families import hf_config, read_architecture
from erollout.policy.initialization import initial_tensor

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
"""Scorers of the tests can be imported."""


@dataclass(frozen=True, slots=True)
class Outcome:
    status: int
    stdout: str
    stderr: str

    def error(self) -> str:
        """The one line that a failed command must leave on stderr."""
        assert self.status not in (0, None), self.stdout + self.stderr
        assert "Traceback" not in self.stderr, self.stderr
        lines = [line for line in self.stderr.splitlines() if line.startswith("erollout")]
        assert len(lines) == 1 and "error: " in lines[0], self.stderr
        return lines[0]


def invoke(*arguments: str) -> Outcome:
    """The command inside this process (of one rank, or none)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(list(arguments))
        except SystemExit as left:  # argparse
            status = int(left.code or 0)
    return Outcome(status, out.getvalue(), err.getvalue())


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "erollout.cli", *arguments]


def execute(*arguments: str, timeout: float = 280, **environment: str) -> Outcome:
    """The command as a process of its own."""
    done = subprocess.run(
        command(*arguments), env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def save_random_model(folder: Path) -> Path:
    """A Hugging Face directory with untrained weights and the character tokenizer."""
    architecture = read_architecture(ARCHITECTURE, "tests")
    save_character_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(hf_config(architecture, "float32")))
    shapes = architecture.logical_tensors()
    weights = {name: initial_tensor(name, shape, architecture.num_layers, 0) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
