"""Batch files and Dockerfiles, unused: what shell and linters say; that what they read is documented and is what is sent."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "slurm").glob("*.sbatch"))
CONTAINERS = sorted((ROOT / "launch" / "containers").glob("*.Dockerfile"))
README = ROOT / "slurm" / "README.md"

every_file = pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])


def _variables(*files: Path) -> set[str]:
    return {name for file in files for name in re.findall(r"EROLLOUT_[A-Z_]+", file.read_text())}


def test_the_files_are_there() -> None:
    assert [file.stem for file in FILES] == ["benchmark", "calibrate", "train"]
    assert [file.stem for file in CONTAINERS] == ["cpu", "cuda"]


@pytest.mark.parametrize("file", CONTAINERS, ids=[file.stem for file in CONTAINERS])
def test_a_dockerfile_installs_what_the_setup_asks_for(file: Path) -> None:
    linter = str(Path(sys.executable).with_name("hadolint"))
    done = subprocess.run([linter, str(file)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    text, setup = file.read_text(), (ROOT / "setup.py").read_text()
    (torch,) = re.findall(r"\btorch==[\d.]+", text)
    assert f'"{torch}"' in setup
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', text)
    assert all(f'        "{extra}": [' in setup for extra in extras.split(","))
    assert f"docker build -f {file.relative_to(ROOT)} " in text, "it says how it is built"


def test_the_sites_with_containers_name_the_images_that_are_built() -> None:
    sites = [file.read_text() for file in (ROOT / "slurm" / "sites").glob("*.yaml")]
    named = {image for text in sites for image in re.findall(r"^  image: (\S+)", text, re.MULTILINE)}
    text = (ROOT / "launch" / "containers" / "cuda.Dockerfile").read_text()
    assert len(named) == 2 and all(image in text for image in named)


@every_file
@pytest.mark.parametrize("command", [["bash", "-n"], [str(Path(sys.executable).with_name("shellcheck"))]], ids=["bash", "lint"])
def test_nothing_is_found_in_it(command: list[str], file: Path) -> None:
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@every_file
def test_its_lines_are_like_those_of_the_code(file: Path) -> None:
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        assert len(line) <= 128 and line == line.rstrip() and "\t" not in line, f"{file.name}:{number}"


@every_file
def test_its_options_come_before_its_commands(file: Path) -> None:
    """Slurm stops reading them at the first command."""
    lines = file.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.split()[1].partition("=")[0] for line in lines[:first] if line.startswith("#SBATCH ")]
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
    assert {"--output", "--open-mode", "--ntasks-per-node", "--requeue"} <= set(options)
    (output,) = re.findall(r"^#SBATCH --output=(.*)$", file.read_text(), re.MULTILINE)
    assert "/" not in output, "Slurm makes no directory, and a job without its output fails without a word"


@every_file
def test_without_what_it_needs_it_says_how_to_call_it(file: Path) -> None:
    done = subprocess.run(
        ["bash", str(file), "somewhere"], capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 2 and done.stdout.startswith("usage: sbatch ") and file.name in done.stdout and not done.stderr


def test_all_variables_are_documented_and_used() -> None:
    documented = set(re.findall(r"^\| `(EROLLOUT_[A-Z_]+)` ", README.read_text(), re.MULTILINE))
    assert documented == _variables(*FILES)


def test_what_the_launcher_sends_is_read() -> None:
    assert _variables(ROOT / "launch" / "plan.py") <= _variables(ROOT / "slurm" / "train.sbatch")


def test_a_run_directory_of_two_lines_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "train.sbatch"), f"{tmp_path}/two\nlines", "--config", "x"],
        env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and done.stdout.count("\n") == 1 and "contains a line break" in done.stdout
    assert not list(tmp_path.iterdir())
