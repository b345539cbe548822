"""What a newcomer types: help, mistakes, dry runs without weights, and Ctrl-C while libraries load."""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ENVIRONMENT, command, invoke, save_random_model
from tiny_runs import write_config

from erollout import __version__
from erollout.cli import main
from erollout.command_line.commands import parser
from erollout.config import load_config
from erollout.configuration.arguments import overrides
from erollout.configuration.hub import fetch_line
from erollout.errors import UserError
from erollout.simulation.step_times import read_passes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(write_config(tmp_path))


def _parsers(top: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield top
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _parsers(below)


PARSERS = {below.prog: below for below in _parsers(parser())}


@pytest.mark.parametrize("name", PARSERS)
def test_help_says_what_every_option_is_and_its_default(name: str) -> None:
    text = " ".join(PARSERS[name].format_help().split())
    for action in PARSERS[name]._actions:
        assert action.help or isinstance(action, argparse._SubParsersAction), action.option_strings
        if action.default not in (None, argparse.SUPPRESS, "", []) and action.default is not False:
            told = PARSERS[name]._get_formatter()._get_help_string(action)  # type: ignore[attr-defined]
            assert "default" in told, action.option_strings
    assert "%(" not in text


def test_version_and_module() -> None:
    for start in (["-m", "erollout"], ["-m", "erollout.cli"]):
        done = subprocess.run(
            [sys.executable, *start, "--version"], env=ENVIRONMENT, capture_output=True, text=True, timeout=100
        )
        assert done.stdout == f"erollout {__version__}\n" and done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "usage", "words"),
    [
        (["tarin"], "usage: erollout [-h]", "unknown command 'tarin'; did you mean train?; commands are train, sft"),
        (["launch", "slrum"], "usage: erollout launch [-h]", "did you mean slurm?"),
        (["calibrate", "ecplain"], "usage: erollout calibrate [-h]", "did you mean explain?"),
        (["xyz"], "usage: erollout [-h]", "unknown command 'xyz'; commands are train"),
        (["train", "--config", "c", "--dryrun"], "usage: erollout train [-h]", "option --dryrun; did you mean --dry-run?"),
        (["train", "--config", "c", "--xyz", "3"], "usage: erollout train [-h]", "unknown option --xyz"),
        (
            ["train", "--config", "c", "--optimizer.lr=3"],
            "usage: erollout train [-h]",
            "configuration keys have no dashes before them: optimizer.lr=3",
        ),
        (
            ["launch", "ray", "--nodes", "1", "--ranks-per-node", "1", "--config", "c", "--gpu-per-rank", "3"],
            "usage: erollout launch ray",
            "did you mean --gpus-per-rank?",
        ),
        (["launch", "slurm", "--node", "1", "--config", "c"], "usage: erollout launch slurm", "--gpus-per-node"),
        (["launch", "status", "d", "e"], "usage: erollout launch status", "unknown argument e"),
        (["plot", "--run", "d"], "usage: erollout plot", "--out"),
        (["--verison"], "usage: erollout [-h]", "command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_shows_the_usage_of_its_command_and_what_was_meant(arguments: list[str], usage: str, words: str) -> None:
    outcome = invoke(*arguments)
    assert outcome.status == 2 and outcome.stderr.startswith(usage), outcome.stderr
    assert words in outcome.stderr.splitlines()[-1] and "error: " in outcome.stderr.splitlines()[-1]


def test_without_a_command_they_are_listed() -> None:
    outcome = invoke()
    assert outcome.status == 2 and "train a policy by reinforcement learning" in outcome.stderr


def test_overrides_may_stand_behind_options() -> None:
    options = parser().parse_args(["train", "train.steps=1", "--config", "c", "train.seed=2", "--dry-run", "a.b", "=", "3"])
    assert options.overrides == ["train.steps=1", "train.seed=2", "a.b", "=", "3"] and options.dry_run


@pytest.mark.parametrize("kind", ["torchrun", "slurm", "ray"])
def test_a_launcher_takes_overrides_behind_two_dashes(kind: str, config: str) -> None:
    size = {"torchrun": ["--nproc-per-node", "2"]}.get(kind, ["--nodes", "1", "--ranks-per-node", "2"])
    overrides = ["train.steps=7", "train.output_dir=/runs/behind"]
    outcome = invoke("launch", kind, *size, "--config", config, "--dry-run", "--", *overrides)
    assert outcome.status == 0, outcome.stderr
    assert "/runs/behind" in outcome.stdout


LAUNCHERS = [
    ["train"],
    ["sft"],
    ["compare"],
    ["launch", "torchrun", "--nproc-per-node", "2"],
    ["launch", "slurm", "--nodes", "1", "--ranks-per-node", "2"],
    ["launch", "ray", "--nodes", "1", "--ranks-per-node", "2"],
]


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda words: " ".join(words[:2]))
def test_every_launcher_takes_the_run_directory_by_one_name(launcher: list[str], config: str, tmp_path: Path) -> None:
    place = tmp_path / "it's run #1"
    sections = ["speculation.mode=always", "speculation.drafter.group_size=16"] if launcher == ["compare"] else []
    outcome = invoke(*launcher, "--config", config, "--run-dir", str(place), "--dry-run", *sections)
    assert outcome.status == 0, outcome.stderr
    assert str(place) in outcome.stdout.replace("'\"'\"'", "'").replace("''", "'")
    assert not place.exists()
    line = invoke(*launcher, "--config", config, "--run-dir", str(place), "--dry-run", "train.output_dir=other").error()
    assert "--run-dir" in line and "train.output_dir=other" in line


def test_the_run_directory_is_kept_whole() -> None:
    options = parser().parse_args(["train", "--config", "c", "--run-dir", "it's #1", "train.output_dir = it's #1"])
    assert overrides(options)[-1] == 'train.output_dir="it\'s #1"'


@pytest.mark.parametrize("name", ["two\nlines", "a\n\nb", "it's #1", 'say "x"', "back\\slash", "tab\there", " ends ", "é😀"])
def test_a_run_directory_of_any_name_is_the_one_that_was_named(name: str, config: str) -> None:
    options = parser().parse_args(["train", "--config", config, "--run-dir", f"/runs/{name}"])
    assert load_config(config, overrides(options)).train.output_dir == f"/runs/{name}"


def test_a_supervised_run_has_a_dry_run_of_its_own(config: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    outcome = invoke("sft", "--config", config, "--dry-run", "supervised.batch_size=12", "parallel.world_size=2")
    assert outcome.status == 0, outcome.stderr
    for words in ("12 sequences, 100 times", "2 ranks = tensor 1 x data 2", "trained", "GiB training state"):
        assert words in outcome.stdout, outcome.stdout
    assert "responses" not in outcome.stdout and "replica" not in outcome.stdout
    assert "Loading" in outcome.stderr and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["qwen2.5-7b-8gpu", "llama3.1-8b-16gpu"])
def test_a_recipe_of_a_published_model_shows_its_sizes_before_the_weights_are_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = invoke("train", "--config", str(ROOT / "configs" / f"{name}.yaml"), "--dry-run")
    assert outcome.status == 0, outcome.stderr
    parameters, line = {
        "qwen2.5-7b-8gpu": ("7,615,616,512", "hf download Qwen/Qwen2.5-7B-Instruct --local-dir models/Qwen2.5-7B-Instruct"),
        "llama3.1-8b-16gpu": ("8,030,261,248", "hf download meta-llama/Llama-3.1-8B-Instruct"),
    }[name]  # as their model cards say
    assert parameters in outcome.stdout and line in outcome.stdout and "not checked" in outcome.stdout
    assert "GiB training state" in outcome.stdout
    assert ("data/math/train.parquet is not there either" in outcome.stdout) == name.startswith("qwen")
    assert not list(tmp_path.iterdir())


def test_qwen3_is_known_by_name_before_it_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(ROOT / "configs" / "qwen2.5-7b-8gpu.yaml")
    outcome = invoke("train", "--config", recipe, "--dry-run", "model.path=models/Qwen3-8B")
    assert outcome.status == 0, outcome.stderr
    assert "qwen3, 8,190,735,360 parameters, 36 layers" in outcome.stdout and "hf download Qwen/Qwen3-8B" in outcome.stdout
    read_passes(None, "A100", "Qwen3-8B", None, 1)
    with pytest.raises(UserError, match=r"Qwen3-30B-A3B is no folder .* and no published model that is known by name"):
        read_passes(None, "A100", "Qwen3-30B-A3B", None, 1)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-7B-Instruct", "someone/some-model"])
def test_a_name_of_the_hub_gives_the_line_that_fetches_it(name: str, config: str) -> None:
    options = ["model.architecture=null", f"model.path={name}"]
    line = invoke("train", "--config", config, *options).error()
    assert f"hf download {name} --local-dir models/{name.partition('/')[2]}` and set model.path=models/" in line
    tokenizer = invoke("train", "--config", config, "--dry-run", f"model.tokenizer={name}").error()
    assert f"hf download {name}" in tokenizer


@pytest.mark.parametrize("path", ["runs/demo/warm-start", "runs/x", "/a/b", "model", "../x/y"])
def test_a_path_is_no_name_of_the_hub(path: str) -> None:
    assert fetch_line("model.path", path) is None


@pytest.mark.parametrize("name", ["demo", "demo-tp2", "demo-tp2pp2"])
@pytest.mark.parametrize("launcher", ["torchrun", "slurm", "ray"])
def test_the_demos_configuration_runs_on_two_nodes_as_it_is(
    name: str, launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_random_model(tmp_path / "runs" / "demo" / "warm-start")
    size = {"torchrun": ["--nproc-per-node", "4", "--head", "127.0.0.1"]}.get(launcher, ["--ranks-per-node", "4"])
    options = ["--config", str(ROOT / "configs" / f"{name}.yaml"), "--run-dir", "runs/a", "--dry-run"]
    outcome = invoke("launch", launcher, "--nodes", "2", *size, *options)
    assert outcome.status == 0, outcome.stderr
    assert "8" in outcome.stdout and "runs/a" in outcome.stdout


def test_more_ranks_than_a_machine_can_hold_are_refused(config: str) -> None:
    options = ["parallel.world_size=65536", "rollout.prompts_per_step=16384"]
    line = invoke("train", "--config", config, *options).error()
    assert "parallel.world_size = 65536" in line and "erollout launch" in line


ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("name", ["status", pytest.param("train", marks=pytest.mark.full)])
def test_a_terminal_without_a_character_ends_nothing(name: str, tmp_path: Path) -> None:
    run = tmp_path / "Zürich → 東京"
    if name == "status":
        (run / "checkpoints").mkdir(parents=True)
        arguments, utf8 = ["launch", "status", str(run)], "1"
    else:
        config = str(write_config(tmp_path, train={"output_dir": str(run)}))
        arguments, utf8 = ["train", "--config", config, "--dry-run"], "0"
    environment = ENVIRONMENT | ASCII | {"PYTHONUTF8": utf8}
    done = subprocess.run(command(*arguments), env=environment, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert b"Z\\xfcrich" in done.stdout


@pytest.mark.end_to_end
@pytest.mark.parametrize("after", [0.8, *(pytest.param(after, marks=pytest.mark.full) for after in (0.05, 3.0, 6.0))])
def test_ctrl_c_while_libraries_load_ends_the_command_without_a_traceback(after: float, config: str) -> None:
    """From our first lines on: what comes before is Python's own."""
    arguments = ["train", "--config", config, "parallel.world_size=1", "train.steps=100000", "rollout.dtype=float32"]
    start = [sys.executable, "-X", "importtime", *command(*arguments)[1:]]  # tells of each module on stderr
    with subprocess.Popen(start, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "erollout.resilience.signals" in line:
                break
        time.sleep(after)
        os.killpg(process.pid, signal.SIGINT)
        late = threading.Timer(100, os.killpg, (process.pid, signal.SIGKILL))  # it would train for ever
        late.start()
        errors = [line for line in process.stderr if "import time:" not in line]
        late.cancel()
    assert not any("Traceback" in line for line in errors), errors
    assert process.returncode == 130 and "erollout: interrupted\n" in errors


INTERRUPTED_IN = """
import os, signal, sys
from erollout.cli import run

name = sys.argv.pop()

def interrupt(frame, event, argument):
    if event == "call" and frame.f_code.co_name == name:
        sys.setprofile(None)
        os.kill(os.getpid(), signal.SIGINT)

sys.setprofile(interrupt)
run()
"""


@pytest.mark.parametrize(
    "function",
    [
        "run_command",
        "load_config",
        *(pytest.param(f, marks=pytest.mark.full) for f in ("quiet_libraries", "parser", "parse_args", "preflight")),
    ],
)
def test_ctrl_c_is_one_line_wherever_a_command_is(function: str, config: str) -> None:
    """Between the blocks that end the process at once, too: each function is interrupted as it is entered."""
    start = [sys.executable, "-c", INTERRUPTED_IN, "train", "--config", config, "parallel.world_size=1", function]
    done = subprocess.run(start, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 130 and done.stderr.endswith("erollout: interrupted\n") and "Traceback" not in done.stderr


def test_main_is_called_with_the_arguments_it_is_given(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert main(["plot", "--run", str(tmp_path), "--out", "x.png"]) == 2 and str(tmp_path) in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
