"""Tests of configurations that extend others, and of `erollout config`."""

from pathlib import Path

import pytest
from commands import invoke

from erollout.config import load_config, load_layers
from erollout.errors import UserError

_BASE = """
model: {path: m}
data:
  kind: chain_sum_cot
  args: {max_terms: 3, min_terms: 2}
rollout: {stop: [a, b], group_size: 4}
rewards: {function: mine:score}
"""


def _write(directory: Path, **files: str) -> Path:
    for name, text in files.items():
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}.yaml").write_text(text)
    return directory


def test_sections_merge_and_other_values_replace(tmp_path: Path) -> None:
    folder = _write(tmp_path, base=_BASE, mine="extends: base.yaml\nrollout: {stop: [c]}\ndata: {args: {max_terms: 9}}\n")
    config, origins = load_layers(folder / "mine.yaml", ["rollout.top_k=5"])
    assert (config.rollout.stop, config.rollout.group_size, config.rollout.top_k) == (("c",), 4, 5)
    assert config.data.args == {"max_terms": 9}
    assert origins["rollout.stop"] == str(folder / "mine.yaml")
    assert origins["rollout.group_size"] == str(folder / "base.yaml")
    assert origins["rollout.top_k"] == "command line" and "rollout.top_p" not in origins


def test_paths_of_bases_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    _write(tmp_path / "a", base=_BASE)
    _write(tmp_path / "b", middle="extends: ../a/base.yaml\ntrain: {steps: 7}\n")
    folder = _write(tmp_path, mine="extends: b/middle.yaml\ntrain: {output_dir: here}\n")
    config = load_config(folder / "mine.yaml")
    assert (config.train.steps, config.train.output_dir, config.rollout.group_size) == (7, "here", 4)
    assert config.rewards.import_path == str((tmp_path / "b" / "../a").absolute())  # where the file that names the function is


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: none.yaml\n", ["mine.yaml", "extends = 'none.yaml'", "no file"]),
        ("extends: [base.yaml]\n", ["mine.yaml", "one file"]),
        ("extends: 3\n", ["mine.yaml", "one file"]),
        ("extends: mine.yaml\n", ["extends itself", "mine.yaml -> "]),
        ("extends: circle.yaml\n", ["extends itself", "circle.yaml"]),
        ("extends: wrong.yaml\n", ["wrong.yaml: unknown key train.stepz", "train.steps"]),
        ("extends: base.yaml\ntrain: {steps: no}\n", ["mine.yaml: train.steps"]),
    ],
)
def test_what_can_not_be_extended_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    folder = _write(tmp_path, base=_BASE, wrong=f"{_BASE}train: {{stepz: 3}}\n", circle="extends: mine.yaml\n", mine=text)
    with pytest.raises(UserError) as error:
        load_config(folder / "mine.yaml")
    assert all(word in str(error.value) for word in words), error.value


def test_show_prints_a_configuration_that_loads_as_the_same(tmp_path: Path) -> None:
    folder = _write(tmp_path, base=_BASE, mine="extends: base.yaml\nrollout: {stop: ['1e3', 'on', \"\\n\"]}\n")
    shown = invoke("config", "show", "--config", str(folder / "mine.yaml"), "optimizer.lr=1e-05")
    assert shown.status == 0 and f"# {folder / 'base.yaml'}" in shown.stdout and "# command line" in shown.stdout
    _write(folder, again=shown.stdout)
    assert load_config(folder / "again.yaml") == load_config(folder / "mine.yaml", ["optimizer.lr=1e-05"])
    few = invoke("config", "show", "--config", str(folder / "mine.yaml"), "--set")
    assert "group_size: 4" in few.stdout and "top_k" not in few.stdout and "optimizer" not in few.stdout


def test_diff_names_the_keys_that_differ(tmp_path: Path) -> None:
    folder = _write(tmp_path, base=_BASE, mine="extends: base.yaml\nrollout: {group_size: 2}\n")
    run = _write(tmp_path / "run", config=_BASE)
    (tmp_path / "empty").mkdir()
    differing = invoke("config", "diff", str(folder / "base.yaml"), str(folder / "mine.yaml"))
    assert differing.status == 0 and differing.stdout.splitlines() == ["rollout.group_size", "  - 4", "  + 2"]
    assert "rewards.import_path" in invoke("config", "diff", str(run), str(folder / "base.yaml")).stdout
    same = invoke("config", "diff", str(run), str(run))
    assert same.stdout == "no difference\n"
    refused = invoke("config", "diff", str(tmp_path / "empty"), str(run))
    assert refused.status == 2 and "config.yaml" in refused.stderr
