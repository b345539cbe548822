"""The recorder of runs: that its configurations are valid, and that it notices one bit."""

import copy
import sys
from pathlib import Path

import pytest
import torch

from erollout.config import load_config

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import recorded_runs


def test_every_recorded_configuration_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the runs are started
    names = set()
    for run in (recorded_runs.SFT, recorded_runs.PP2, *recorded_runs.RESUMED, *recorded_runs.WHOLE):
        run.write(tmp_path)
        config = load_config(f"{run.name}.yaml")
        assert config.train.output_dir == f"runs/{run.name}"
        names.add(run.name)
    assert names >= {run.equals for run in recorded_runs.RESUMED if run.equals}


def test_one_bit_is_a_difference(capsys: pytest.CaptureFixture[str]) -> None:
    weight = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    changed = weight.clone()
    changed.view(torch.int16)[1, 2] ^= 1
    before = {"final weights": {"a": recorded_runs._digest(weight)}, "train": {"step 1 train/loss": (0.1).hex()}}
    now = copy.deepcopy(before) | {"extra": {"step 1": "0x0.0p+0"}}
    assert recorded_runs.compare("run", before, now)
    now["final weights"]["a"] = recorded_runs._digest(changed)
    assert not recorded_runs.compare("run", before, now)
    del now["train"]
    assert not recorded_runs.compare("run", before, now) and not recorded_runs.compare("run", {}, now)
    assert "1 of 1 DIFFER, first step 1 train/loss" in capsys.readouterr().out
