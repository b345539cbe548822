"""The copy of the code that a submitted run uses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT

import erollout
from erollout.errors import UserError
from erollout.launch.scorer_files import function_in_copy
from erollout.launch.snapshot import Snapshot, take_snapshot
from erollout.rewards.function import split_name

PROGRAM = """
import importlib, json, sys
from erollout.kernels import native
names = ["erollout.cli", "erollout.launch.slurm", "erollout.megatron_patches", "erollout.slurm", "my_rewards"]
print(json.dumps([importlib.import_module(name).__file__ for name in names]))
print(native._library_path(), native._fingerprint())
"""


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return take_snapshot()


def test_the_copy_runs_instead_of_the_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "my_rewards.py").write_text("def score(prompt, response): return 1.0\n")
    monkeypatch.syspath_prepend(mine)
    copy = take_snapshot("my_rewards:score").write(tmp_path / "code")
    environment = ENVIRONMENT | {"PYTHONPATH": f"{copy}:{mine}", "PYTHONSAFEPATH": "1"}
    checkout = Path(__file__).parents[2]  # where Python would look first

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=checkout, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "launch" in python("-m", "erollout.cli", "--help")
    files, kernels = python("-c", PROGRAM).splitlines()
    assert files.count(str(copy)) == 5, files
    assert kernels.startswith(str(copy / "erollout" / "kernels"))


def test_what_is_copied(snapshot: Snapshot) -> None:
    places = set(snapshot.files)
    assert {
        "erollout/cli.py",
        "erollout/launch/local.py",
        "erollout/slurm/train.sbatch",
        "erollout/kernels/cpp/kernels.h",
    } < places
    libraries = {f"erollout/kernels/{file.name}" for file in Path(erollout.__path__[0], "kernels").glob("_native*.so")}
    assert libraries <= places
    assert not [place for place in places if "__pycache__" in place or place.endswith(".pyc")]


def test_equal_code_is_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    first = take_snapshot("a:f")
    folder = first.write(tmp_path / "code")
    (folder / "mark").touch()
    assert first.write(tmp_path / "code") == folder and (folder / "mark").exists()
    assert json.loads((folder / "erollout" / "source.json").read_text()) == {"commit": first.commit, "dirty": first.dirty}
    (tmp_path / "a.py").write_text("x = 2\n")
    with pytest.raises(UserError, match="changed while it was copied"):
        first.write(tmp_path / "elsewhere")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert take_snapshot("a:f").write(tmp_path / "code") != folder
    assert (folder / "a.py").read_text() == "x = 1\n", "a job that waits has it"
    assert len(list((tmp_path / "code").iterdir())) == 2


def test_modules_of_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot) -> None:
    package = tmp_path / "my_scorers"
    package.mkdir()
    for name in ("__init__.py", "math.py", "big.bin"):
        (package / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert take_snapshot("my_scorers.math:f").files.keys() - snapshot.files.keys() == {
        "my_scorers/__init__.py",
        "my_scorers/math.py",
    }
    assert take_snapshot("my_scorers.math:f", str(tmp_path)).files.keys() > snapshot.files.keys()
    for installed in ("json:loads", "yaml:dump", "erollout.rewards.scorers:build_scorer"):
        assert take_snapshot(installed).files.keys() == snapshot.files.keys()
    with pytest.raises(UserError, match=r"rewards.function = nowhere.x:f"):
        take_snapshot("nowhere.x:f")


def test_a_file_of_rewards_goes_with_what_it_imports_from_beside_it(tmp_path: Path, snapshot: Snapshot) -> None:
    (tmp_path / "scores.py").write_text("import json, helper\nfrom tools.text import f\n")
    (tmp_path / "helper.py").write_text("import deeper\n")
    (tmp_path / "tools").mkdir()
    for name in ("deeper.py", "unrelated.py", "tools/text.py"):
        (tmp_path / name).touch()
    found = take_snapshot("scores.py:f", str(tmp_path))
    places = {"scores.py", "helper.py", "deeper.py", "tools/text.py"}
    assert found.files.keys() - snapshot.files.keys() == {f"scorer/{place}" for place in places}
    assert take_snapshot("scores:f", str(tmp_path)).files.keys() - snapshot.files.keys() == places
    folder = found.write(tmp_path / "code")
    name = function_in_copy("scores.py:f", folder)
    assert name == f"{folder}/scorer/scores.py:f" and Path(split_name(name)[0]).is_file()
    with pytest.raises(UserError, match=r"there is no file score\.py in .*did you mean scores\.py"):
        take_snapshot("score.py:f", str(tmp_path))
