"""What an installed package brings along: configurations of the demos, batch scripts, the marker of its types."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOOK_UP = """
from pathlib import Path
import erollout
from erollout.command_line.commands import parser
from erollout.config import load_config

package = Path(erollout.__file__).parent
assert (package / "py.typed").is_file() and (package / "slurm" / "train.sbatch").is_file()
for name in ("demo", "demo-rollout"):
    options = parser().parse_args([name])
    for file in (options.config, options.warm_start):
        assert Path(file).parent == package / "configs", file
        load_config(file)
print(package, load_config(package / "configs" / "demo-tp2.yaml").parallel.tensor_model_parallel_size)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's files as a wheel has them, without the compiled kernels."""
    folder = tmp_path_factory.mktemp("built")
    build = ["egg_info", "--egg-base", str(folder), "build_py", "--build-lib", str(folder / "lib")]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *build], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "lib"


def test_an_installed_package_finds_its_configurations_from_anywhere(installed: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", LOOK_UP], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{installed / 'erollout'} 2\n"
    assert {path.name for path in (installed / "erollout" / "configs").iterdir()} == {
        path.name for path in (ROOT / "configs").iterdir()
    }
