"""The tutorial as a reader follows it: its files, its commands, its program, with a tiny model."""

import re
import runpy
import shlex
from contextlib import chdir
from pathlib import Path

import pytest
from commands import Outcome, invoke, save_random_model
from ranks import RankPool
from tiny_runs import history

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text()
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]


def _invoke_in(folder: str, arguments: list[str]) -> Outcome:
    with chdir(folder):  # the rank is another test's afterwards
        return invoke(*arguments)


def _run_in(folder: str, program: str) -> None:
    with chdir(folder):
        runpy.run_path(program)


@pytest.mark.distributed
@pytest.mark.full
def test_every_block_of_the_tutorial_works(rank_pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    save_random_model(tmp_path / "models" / "mine")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    assert {command[0] for command in COMMANDS} == {"erollout", "mlflow"} and len(COMMANDS) >= 8
    for program, *arguments in COMMANDS:
        if program == "erollout":
            ended: Outcome = rank_pool.run(1, _invoke_in, str(tmp_path), arguments)[0]
            assert ended.status == 0, (arguments, ended.stderr)
    rank_pool.run(1, _run_in, str(tmp_path), "use.py")
    rows = history(tmp_path, "runs/mine")
    assert [row["step"] for row in rows if "reward/mean" in row] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "models" / "trained" / "model.safetensors").exists() and (tmp_path / "reward.png").stat().st_size > 1000
