"""Input that can't be honoured: one line on stderr that names it, exit status 2, before anything is started or written."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import ENVIRONMENT, Outcome, invoke, save_random_model
from test_config_file import NUMBERS, bounds_of
from tiny_runs import write_config


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A configuration that is as it should be; `{folder}` in a case is where it lies."""
    return str(write_config(tmp_path))


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def _nothing(folder: Path) -> None:
    """The configuration alone is wrong."""


def _file(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return write


def _model(folder: Path) -> Path:
    return save_random_model(folder / "model")


def _truncated_model(folder: Path) -> None:
    weights = _model(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _model_of_another_size(folder: Path) -> None:
    path = _model(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 48}))


def _model_of_another_family(folder: Path) -> None:
    path = _model(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mamba"}))


def _rows(*rows: dict[str, str]) -> Callable[[Path], None]:
    return _file("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


GOOD_ROW = {"prompt": "1+1=", "answer": "2"}
FILE_DATA = ["data.kind=file", "data.args={}", "data.train_files=[{folder}/rows.jsonl]"]
PATH_MODEL = ["model.architecture=null", "model.tokenizer=null", "model.path={folder}/model"]

CASES: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "misspelt key": (_nothing, ["train.stesp=3"], ["train.stesp", "did you mean train.steps?"]),
    "wrong type": (_nothing, ["train.steps=many"], ["train.steps = 'many'"]),
    "layout and world": (
        _nothing,
        ["parallel.world_size=3", "parallel.tensor_model_parallel_size=2"],
        ["parallel.tensor_model_parallel_size", "= 2", "3 ranks"],
    ),
    "decode layout and world": (
        _nothing,
        ["parallel.world_size=3", "rollout.tensor_model_parallel_size=2"],
        ["rollout.tensor_model_parallel_size = 2", "3 ranks"],
    ),
    "tensor parallel and heads": (
        _nothing,
        ["parallel.world_size=4", "parallel.tensor_model_parallel_size=4"],
        ["parallel.tensor_model_parallel_size = 4", "key/value heads = 2", "4 tensor-parallel ranks"],
    ),
    "decode tensor parallel and heads": (
        _nothing,
        ["parallel.world_size=4", "rollout.tensor_model_parallel_size=4"],
        ["rollout.tensor_model_parallel_size = 4", "key/value heads = 2", "4 tensor-parallel ranks"],
    ),
    "pipeline and layers": (
        _nothing,
        ["parallel.pipeline_model_parallel_size=4"],
        ["2 layers", "parallel.pipeline_model_parallel_size = 4"],
    ),
    "batch and data parallel": (
        _nothing,
        ["parallel.world_size=4", "train.global_batch_size=2"],
        ["train.global_batch_size = 2", "4 data-parallel ranks"],
    ),
    "context": (
        _nothing,
        ["model.max_position_embeddings=64"],
        ["rollout.max_prompt_tokens + rollout.max_tokens = 72", "context of 64"],
    ),
    "tokenizer and vocabulary": (_nothing, ["model.architecture.vocab_size=60"], ["{folder}/tokenizer has 64 tokens", "is 60"]),
    "no tokenizer": (_nothing, ["model.tokenizer={folder}/none"], ["{folder}/none", "model.tokenizer"]),
    "damaged tokenizer": (_file("broken/tokenizer.json", "{"), ["model.tokenizer={folder}/broken"], ["{folder}/broken"]),
    "no model": (_nothing, PATH_MODEL, ["{folder}/model/config.json"]),
    "truncated model": (_truncated_model, PATH_MODEL, ["{folder}/model/model.safetensors is truncated"]),
    "weights of another model": (_model_of_another_size, PATH_MODEL, ["model.safetensors: tensor", "_proj.weight"]),
    "unknown family": (_model_of_another_family, PATH_MODEL, ["config.json", "model_type = 'mamba'"]),
    "export over the model": (
        _model,
        [*PATH_MODEL, "checkpoint.export_path={folder}/model"],
        ["checkpoint.export_path = {folder}/model", "model.path"],
    ),
    "export over something else": (
        _file("diary/monday.txt", "sun"),
        ["checkpoint.export_path={folder}/diary"],
        ["{folder}/diary", "not an exported model"],
    ),
    "row without its column": (
        _rows(GOOD_ROW, {"prompt": "1+2="}),
        FILE_DATA,
        ["{folder}/rows.jsonl:2", "'answer'", "data.answer_column"],
    ),
    "row that is no JSON": (_file("rows.jsonl", "{}{"), FILE_DATA, ["{folder}/rows.jsonl:1", "not valid JSON"]),
    "no dataset": (_nothing, FILE_DATA, ["{folder}/rows.jsonl", "No such file"]),
    "long prompt in a file": (
        _rows(GOOD_ROW, GOOD_ROW, {"prompt": "1+" * 40 + "1=", "answer": "41"}),
        FILE_DATA,
        ["{folder}/rows.jsonl:3", "rollout.max_prompt_tokens = 48"],
    ),
    "unknown task": (
        _nothing,
        ["data.kind=reasoning_gym", "data.args={}", "data.tasks=[{name: chain_sun}]"],
        ["data.tasks.0.name = 'chain_sun'", "did you mean chain_sum?"],
    ),
    "task with characters that the tokenizer lacks": (
        _nothing,
        ["data.kind=reasoning_gym", "data.args={}", "data.tasks=[{name: chain_sum}]"],
        ["chain_sum item 20000000", "the tokenizer can't encode"],
    ),
    "scorer that exits at import": (
        _file("scores.py", "import sys; sys.exit()"),
        ["rewards.function=scores:raises"],
        ["rewards.function = 'scores:raises'", "exits when it is imported"],
    ),
    "scorer in no file": (_nothing, ["rewards.function=scores/score.py:f"], ["no file score.py in {folder}/scores"]),
    "endless time limit": (_nothing, ["rewards.timeout_seconds=1e10"], ["rewards.timeout_seconds"]),
    "half a character": (
        _file("rows.jsonl", '{"prompt": "1+1= \\ud83d", "answer": "2"}'),
        FILE_DATA,
        ["{folder}/rows.jsonl:1"],
    ),
    "blank reference answer": (
        _rows(GOOD_ROW, {"prompt": "1+2=", "answer": " "}),
        [*FILE_DATA, "rewards.function=null"],
        ["1 reference answers can't be used", "{folder}/rows.jsonl:2", "is empty"],
    ),
    "unknown scorer": (_nothing, ["rewards.function=no_such_module:score"], ["rewards.function = 'no_such_module:score'"]),
    "output directory in a file": (
        _file("taken", ""),
        ["train.output_dir={folder}/taken/run"],
        ["train.output_dir = {folder}/taken/run", "{folder}/taken is a file"],
    ),
    "checkpoints in a file": (
        _file("taken", ""),
        ["checkpoint.interval=1", "checkpoint.directory={folder}/taken"],
        ["checkpoint.directory = {folder}/taken"],
    ),
    "stop token outside the vocabulary": (
        _nothing,
        ["rollout.stop_token_ids=[66, 67]"],
        ["rollout.stop_token_ids = 67", "67 tokens"],
    ),
    "cache that holds no response": (
        _nothing,
        ["rollout.num_kv_blocks=1"],
        ["rollout.max_tokens = 24 need 2 KV blocks", "pool has 1"],
    ),
    "cache that holds nothing": (_nothing, ["rollout.kv_cache_gib=1e-6"], ["rollout.kv_cache_gib = 1e-06"]),
    "unknown kind of tracking store": (
        _nothing,
        ["tracking.enabled=true", "tracking.uri=gopher://here"],
        ["tracking.uri = gopher://here"],
    ),
    "tracking store in no directory": (
        _file("taken", ""),
        ["tracking.enabled=true", "tracking.uri=sqlite:///{folder}/taken/mlflow.db"],
        ["tracking.uri = sqlite:///{folder}/taken/mlflow.db"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_is_refused_in_one_line(name: str, config: str, tmp_path: Path) -> None:
    prepare, overrides, words = CASES[name]
    prepare(tmp_path)
    before = _files(tmp_path)
    filled = [override.replace("{folder}", str(tmp_path)) for override in overrides]
    outcome = invoke("train", "--config", config, "--dry-run", *filled)
    assert outcome.status == 2
    line = outcome.error()
    for word in words:
        assert word.replace("{folder}", str(tmp_path)) in line
    assert _files(tmp_path) == before, "something was written or removed"


BOUNDED = [key for key in NUMBERS if not key.startswith("data.tasks")]
OF_MANY_CHECKS = (
    "parallel.world_size",
    "parallel.timeout_seconds",
    "rollout.prompts_per_step",
    "rollout.max_tokens",
    "rollout.kv_cache_gib",
    "rollout.stop_token_ids",
    "speculation.toggle.bootstrap_seconds",
    "speculation.toggle.ladder.rungs",
    "speculation.drafter.group_size",
    "rewards.timeout_seconds",
    "data.train_size",
    "train.steps",
    "train.global_batch_size",
    "train.max_tokens_per_micro_batch",
    "fault_tolerance.hang_seconds",
)
"""Keys whose values meet further checks: sizes that follow from several keys, time limits of torch and of the system, lists."""


def test_keys_of_many_checks_are_keys_with_bounds() -> None:
    assert set(OF_MANY_CHECKS) <= set(BOUNDED)


@pytest.mark.parametrize(
    "key",
    [*OF_MANY_CHECKS, *(pytest.param(key, marks=pytest.mark.full) for key in BOUNDED if key not in OF_MANY_CHECKS)],
)
def test_the_least_and_the_largest_number_are_honoured_or_refused_in_one_line(key: str, config: str) -> None:
    for bound in bounds_of(NUMBERS[key]):
        (value,) = (getattr(bound, name) for name in ("ge", "gt", "le", "lt") if hasattr(bound, name))
        outcome = invoke("train", "--config", config, "--dry-run", f"{key}={value}")
        assert outcome.status == 0 or outcome.error()


def _files(folder: Path) -> dict[str, bytes]:
    """By path; without what Python compiles of a scorer."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_without_any_of_it_the_configuration_is_accepted(config: str) -> None:
    outcome = invoke("train", "--config", config, "--dry-run")
    assert outcome.status == 0, outcome.stderr


def test_tracking_server_that_is_not_there(config: str, busy_port: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = free.getsockname()[1]
    uri = f"http://user:secret@127.0.0.1:{closed}"
    line = invoke("train", "--config", config, "--dry-run", "tracking.enabled=true", f"tracking.uri={uri}").error()
    assert f"tracking.uri = http://127.0.0.1:{closed}" in line and "secret" not in line


def test_config_file_that_is_not_there(tmp_path: Path) -> None:
    line = invoke("train", "--config", str(tmp_path / "none.yaml")).error()
    assert str(tmp_path / "none.yaml") in line


def test_directory_without_permission(config: str, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write everywhere")
    line = invoke("train", "--config", config, "--dry-run", f"train.output_dir={locked}/run").error()
    assert f"train.output_dir = {locked}/run" in line and "no permission" in line


def test_rollout_output_is_checked_before_the_rollout(config: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    line = invoke("rollout", "--config", config, "--out", str(tmp_path / "taken" / "out.jsonl")).error()
    assert "--out" in line and str(tmp_path / "taken") in line


def test_plot_of_a_directory_without_a_run(tmp_path: Path) -> None:
    assert str(tmp_path) in invoke("plot", "--run", str(tmp_path), "--out", str(tmp_path / "out.png")).error()


@pytest.mark.parametrize("arguments", [["tarin"], ["train"], ["rollout", "--config", "c.yaml"]], ids=" ".join)
def test_unknown_or_incomplete_command(arguments: list[str]) -> None:
    outcome = invoke(*arguments)
    assert outcome.status == 2 and "error: " in outcome.stderr


def test_world_of_another_size_than_the_configuration(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = invoke("train", "--config", config, "parallel.world_size=4").error()
    assert "parallel.world_size = 4" in line and "2 ranks" in line


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0"}, ["RANK = 0", "WORLD_SIZE is not", "torchrun"]),
        ({"RANK": "0", "WORLD_SIZE": ""}, ["RANK = 0", "WORLD_SIZE is not"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK = 2 is not below WORLD_SIZE = 2"]),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, ["RANK = '-1'"]),
        ({"RANK": "first", "WORLD_SIZE": "2"}, ["RANK = 'first'"]),
        ({"RANK": "0", "WORLD_SIZE": "0"}, ["WORLD_SIZE = '0'", "at least 1"]),
        ({"RANK": "0", "WORLD_SIZE": "1.5"}, ["WORLD_SIZE = '1.5'"]),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, ["WORLD_SIZE = '999"]),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}, ["LOCAL_RANK = 'x'"]),
        ({"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "x"}, ["TORCHELASTIC_RESTART_COUNT = 'x'"]),
    ],
)
@pytest.mark.parametrize("last", ["--dry-run", "train.steps=1"])
def test_environment_that_no_launcher_makes(
    variables: dict[str, str], words: list[str], last: str, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = invoke("train", "--config", config, last).error()
    assert all(word in line for word in words), line


def test_empty_variables_are_as_if_they_were_not_there(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
    assert invoke("train", "--config", config, "--dry-run").status == 0
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert invoke("train", "--config", config, "--dry-run").status == 0
    assert "MASTER_ADDR" in invoke("train", "--config", config).error()


def test_rendezvous_port_that_is_taken(config: str, busy_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": busy_port}.items():
        monkeypatch.setenv(name, str(value))
    line = invoke("train", "--config", config).error()
    assert "MASTER_PORT" in line and str(busy_port) in line


NO_PORTS = """
import pathlib, socket, subprocess, sys
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40000")
taken = socket.socket()
taken.bind(("", 40000))
from erollout.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.full
def test_no_free_port(config: str) -> None:
    """In a network of its own, where the one port there is to give is taken."""
    isolated = ["unshare", "--net", "--map-root-user"]
    if shutil.which("unshare") is None or shutil.which("ip") is None or subprocess.run([*isolated, "true"]).returncode:
        pytest.skip("this user may not make a network namespace")
    arguments = ["train", "--config", config, "parallel.world_size=2"]
    command = [*isolated, sys.executable, "-c", NO_PORTS, *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert "no free port on localhost" in outcome.error() and outcome.status == 2


def test_rendezvous_without_an_address(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert "MASTER_ADDR" in invoke("train", "--config", config).error()
