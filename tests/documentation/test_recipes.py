"""The recipes as a reader follows them: files, edits of a copy of our sources, programs and commands, in order."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import save_random_model
from pages import RECIPES, ROOT, blocks, commands, edits, files

FOLLOW = """
import json, runpy, sys
from erollout.cli import main
sys.path.insert(0, "")
for program, *arguments in json.loads(sys.argv[1]):
    print("$", program, *arguments, flush=True)
    if program == "erollout":
        assert main(arguments) == 0
    else:
        runpy.run_path(program, run_name="__main__")
"""
"""All in one process: importing torch, transformers and megatron-core takes longer than most commands."""


def _steps(page: Path) -> list[list[str]]:
    """Programs and commands of a page, in its order; files with functions and our own sources are imported by others."""
    steps: list[list[str]] = []
    for block in blocks(page):
        if block.kind == "run by":
            steps += commands(block.text)
        elif block.kind == "file" and _is_program(block.note, block.text):
            steps.append([block.note])
    return steps


def _is_program(name: str, text: str) -> bool:
    return name.endswith(".py") and not name.startswith("erollout/") and re.search(r"^def ", text, re.MULTILINE) is None


@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_edits_fit_the_sources(page: Path) -> None:
    changed: dict[str, str] = {}
    for name, old, new in edits(page):
        text = changed.get(name) or (ROOT / name).read_text()
        assert text.count(old) == 1, f"{page.name} edits {name}, where this is not found once:\n{old}"
        changed[name] = text.replace(old, new)
    for name, text in changed.items():
        compile(text, name, "exec")
    for name in files(page):
        assert not (ROOT / name).exists(), f"{page.name} makes {name}, which exists"


@pytest.mark.full
@pytest.mark.end_to_end
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_every_recipe_works(page: Path, tmp_path: Path) -> None:
    sources = _copy_of_the_sources(tmp_path / "sources")
    work = tmp_path / "work"
    (work / "models" / "mine").mkdir(parents=True)
    save_random_model(work / "models" / "mine")
    for name, text in files(page).items():
        ((sources if name.startswith("erollout/") else work) / name).write_text(text)
    for name, old, new in edits(page):
        (sources / name).write_text((sources / name).read_text().replace(old, new))
    steps = _steps(page)
    assert len(steps) >= 2
    environment = os.environ | {"PYTHONPATH": str(sources), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FOLLOW, json.dumps(steps)]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def _copy_of_the_sources(to: Path) -> Path:
    """Our packages, to be edited; those at the top of the tree are where an installation has them."""
    shutil.copytree(ROOT / "erollout", to / "erollout", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("launch", "megatron_patches", "slurm"):
        (to / "erollout" / name).symlink_to(ROOT / name)
    return to
