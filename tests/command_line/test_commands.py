"""Whole commands as a user starts them: the demo and what works on its results, and commands that are ended from outside."""

import contextlib
import io
import json
import socket
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from commands import Outcome, execute, invoke
from ranks import RankPool
from tiny_runs import ARCHITECTURE, all_rows, history, tiny_tree, train_here, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from erollout import __version__
from erollout.command_line.demo import _run, demo_commands
from erollout.types import Rollout


def invoke_here(*arguments: str) -> Outcome:
    """For RankPool.run(1, ...)."""
    return invoke(*arguments)


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.full)], ids=["one rank", "two ranks"])
def demo(request: pytest.FixtureRequest, rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The demo with a tiny model and a few steps: its folder and how it ended. On one rank, its commands run on a warm one."""
    ranks = request.param
    folder = tmp_path_factory.mktemp("demo")
    tree = tiny_tree(folder, data={"args": {"max_terms": 4}, "test_size": 8}, evaluation={"interval": 2, "num_prompts": 8})
    tree |= {
        "model": {"path": str(folder / "warm-start")},
        "parallel": {"world_size": ranks, "pipeline_model_parallel_size": ranks},
        "train": {"steps": 3, "output_dir": str(folder / "run")},
        "tracking": {"experiment": "tiny"},
        "checkpoint": {"interval": 2, "export_path": str(folder / "trained")},
    }
    warm_start = {
        "model": {"architecture": ARCHITECTURE, "tokenizer": str(folder / "new-tokenizer")},
        "parallel": {"world_size": ranks},
        "data": {"kind": "chain_sum_cot"},
        "supervised": {"steps": 4, "batch_size": 8},
        "train": {"output_dir": str(folder / "sft")},
        "tracking": {"enabled": False},
        "checkpoint": {"export_path": str(folder / "warm-start")},
    }
    for name, content in {"demo": tree, "sft": warm_start}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    warm, config = str(folder / "sft.yaml"), str(folder / "demo.yaml")
    overrides = ["train.steps=2"]
    if ranks == 2:
        return folder, execute("demo", "--config", config, "--warm-start", warm, *overrides)
    printed = io.StringIO()
    outcomes = []
    with contextlib.redirect_stdout(printed):
        for arguments in demo_commands(config, warm, overrides):
            outcomes += rank_pool.run(1, invoke_here, *arguments)
    output, errors = (each.stdout for each in outcomes), (each.stderr for each in outcomes)
    return folder, Outcome(max(each.status for each in outcomes), printed.getvalue() + "".join(output), "".join(errors))


@pytest.mark.end_to_end
def test_demo_ends_with_the_table(demo: tuple[Path, Outcome]) -> None:
    folder, outcome = demo
    assert outcome.status == 0, outcome.stderr
    for words in ("Warm-up: 4 supervised steps", "Reinforcement learning: 2 steps", "step=2/2"):
        assert words in outcome.stdout
    for row in (
        "held-out accuracy, before and after",
        "reward, first and last",
        "rollout seconds",
        "MLflow run",
        "MLflow store",
    ):
        assert row in outcome.stdout
    assert "Traceback" not in outcome.stderr and "error" not in outcome.stderr.lower()
    assert [row["step"] for row in history(folder)] == [1, 2]
    assert len(all_rows(folder, "sft")) == 4


@pytest.mark.end_to_end
def test_demo_is_tracked_and_its_model_loads_in_transformers(demo: tuple[Path, Outcome]) -> None:
    import mlflow

    folder, _ = demo
    client = mlflow.MlflowClient(f"sqlite:///{folder}/run/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["train.steps"] == "2"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2]
    files = {file.path for top in ("config", "figures") for file in client.list_artifacts(run.info.run_id, top)}
    assert {"config/config.yaml", "figures/reward.png", "figures/curves.png"} <= files
    model, tokenizer = (auto.from_pretrained(folder / "trained") for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.vocab_size == ARCHITECTURE["vocab_size"] and tokenizer.eos_token == "<eos>"


@pytest.mark.end_to_end
def test_plot_and_rollout_work_on_what_the_demo_made(demo: tuple[Path, Outcome], rank_pool: RankPool, tmp_path: Path) -> None:
    folder, _ = demo
    picture, out = tmp_path / "reward.png", tmp_path / "new" / "out.jsonl"
    assert invoke("plot", "--run", str(folder / "run"), "--out", str(picture)).status == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    options = ["parallel.world_size=1", "parallel.pipeline_model_parallel_size=1", f"model.path={folder}/trained"]
    options += [f"train.output_dir={tmp_path}/none", "evaluation.samples_per_prompt=2", "checkpoint.export_path=null"]
    ended: Outcome = rank_pool.run(
        1, invoke_here, "rollout", "--config", str(folder / "demo.yaml"), "--out", str(out), *options
    )[0]
    assert ended.status == 0, ended.stderr
    assert "pass@2" in ended.stdout and "tokens/s" in ended.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 16
    for row in rows:
        assert row.keys() == {"reward", "task", "text", "prompt", "reference", *(field.name for field in fields(Rollout))}
        assert len(row["rollout_logprobs"]) == len(row["response_ids"]) and max(row["rollout_logprobs"]) <= 0
        assert row["task"] == "chain_sum_cot" and 0 <= row["reward"] <= 1
    assert not (tmp_path / "none").exists(), "a rollout alone records nothing"


def test_commands_run_until_one_fails_and_each_is_a_process_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert _run([["--version"], ["tarin"], ["--version"]]) == 2
    printed = capfd.readouterr()
    assert printed.out.count(__version__) == 1 and "did you mean train?" in printed.err


@pytest.mark.end_to_end
@pytest.mark.full
def test_a_command_of_the_demo_that_fails_ends_it_with_its_status(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is a process of its own, which says why."""
    config = write_config(tmp_path, model={"architecture": None, "path": str(tmp_path / "warm-start")})
    warm = tmp_path / "sft.yaml"
    wrong = {"world_size": 2, "tensor_model_parallel_size": 3}
    tree = tiny_tree(tmp_path, parallel=wrong, checkpoint={"export_path": str(tmp_path / "warm-start")})
    warm.write_text(yaml.safe_dump(tree))
    outcome = invoke("demo", "--config", str(config), "--warm-start", str(warm))
    assert outcome.status == 2 and "error: parallel.tensor_model_parallel_size" in capfd.readouterr().err
    assert "Warm-up" in outcome.stdout and "Reinforcement learning" not in outcome.stdout


def test_dry_run_prints_layouts_sizes_and_places_and_writes_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path, parallel={"world_size": 4, "tensor_model_parallel_size": 2}, checkpoint={"interval": 5})
    before = sorted(tmp_path.rglob("*"))
    outcome = invoke(
        "train", "--config", str(config), "--dry-run", "rollout.tensor_model_parallel_size=2", "train.global_batch_size=8"
    )
    assert outcome.status == 0, outcome.stderr
    for words in (
        "4 ranks = tensor 2 x data 2 x pipeline 1",
        "2 replicas of 2 ranks",
        "2 optimizer steps of 8 samples",
        "ranks 2, 3",
        "GiB",
        "every 5 steps",
        "off",
        str(tmp_path / "run"),
    ):
        assert words in outcome.stdout, words
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_shows_what_is_read_what_the_model_sees_and_what_scores(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+1=\nor " + "9" * 400, "answer": str(i + 1)} for i in range(1200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"kind": "file", "args": {}, "train_files": [str(tmp_path / "rows.jsonl")], "instruction": "say {prompt}"}
    rollout = {"max_prompt_tokens": 500, "max_tokens": 20}
    model = {"architecture": ARCHITECTURE | {"max_position_embeddings": 1024}}
    config = write_config(tmp_path, data=data, rollout=rollout, model=model, rewards={"function": None, "threshold": 0.5})
    own = invoke("train", "--config", str(config), "--dry-run")
    assert own.status == 0, own.stderr
    lines = {line[:19].strip(): line[21:] for line in own.stdout.splitlines()}
    assert lines["data"] == "1,200 rows to train on, none to test on"
    number = int(lines["its reference"].strip("'")) - 1
    beginning = f"<bos>say {number}+1=\\nor 9999"
    assert lines["first prompt"].startswith(f"'{beginning}") and " ..., " in lines["first prompt"]
    assert lines["reward function"] == "erollout.rewards.math_scorer:score, 1 from 0.5 on, else 0"
    sft = invoke("sft", "--config", str(write_config(tmp_path)), "--dry-run")
    lines = {line[:19].strip(): line[21:] for line in sft.stdout.splitlines()}
    assert lines["data"].startswith("1,000,000 generated items to train on, 200") and "reward function" not in lines
    assert lines["its solution"].strip("'")


@pytest.mark.distributed
def test_run_without_tracking_keeps_its_metrics_and_has_no_store(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(1, train_here, tiny_tree(tmp_path, train={"steps": 1}))
    assert history(tmp_path)[0]["step"] == 1
    assert not list(tmp_path.rglob("mlflow.db")) and not list(tmp_path.rglob("*.png"))


@pytest.mark.distributed
def test_files_are_scored_by_their_own_scorer_and_reported_one_by_one(rank_pool: RankPool, tmp_path: Path) -> None:
    files = {split: [str(tmp_path / f"{split}_{kind}.jsonl") for kind in ("plus", "minus")] for split in ("train", "test")}
    for number, path in enumerate(path for paths in files.values() for path in paths):
        rows = [{"prompt": f"{number * 10 + i}+1=", "answer": str(number * 10 + i + 1)} for i in range(4)]
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"kind": "file", "args": {}, "train_files": files["train"], "test_files": files["test"]}
    evaluation = {"interval": 2, "num_prompts": 50}  # more than there are
    tree = tiny_tree(tmp_path, data=data, train={"steps": 2}, evaluation=evaluation, rewards={"function": None})
    tree["rollout"] |= {"prompts_per_step": 8}  # one epoch
    rank_pool.run(2, train_here, tree)
    for row in history(tmp_path):
        assert row["reward/scoring_errors"] == 0 and {"reward/train_plus", "reward/train_minus"} <= row.keys()
    evaluations = [row for row in all_rows(tmp_path) if "evaluation/test_plus/pass_at_1" in row]
    assert [row["step"] for row in evaluations] == [0, 2]


@pytest.mark.end_to_end
@pytest.mark.full
def test_error_of_all_ranks_is_one_line_and_a_busy_port_in_the_environment_is_none(rank_pool: RankPool, tmp_path: Path) -> None:
    """The local launcher takes a port of its own, whatever MASTER_PORT says; the checkpoint is what the ranks refuse."""
    sections = {"checkpoint": {"interval": 1}, "parallel": {"world_size": 2}}
    rank_pool.run(2, train_here, tiny_tree(tmp_path, train={"steps": 1, "output_dir": str(tmp_path / "run")}, **sections))
    config = str(write_config(tmp_path, **sections))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        outcome = execute("train", "--config", config, "model.architecture.hidden_size=16", **address)
    assert "step_00000001 has another model" in outcome.error() and outcome.status == 2
