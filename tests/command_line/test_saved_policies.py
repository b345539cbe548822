"""Commands on a run's checkpoint: export, evaluate, rollout, generate. Saved on two pipeline stages, and read on one rank."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import Outcome, invoke, save_random_model
from ranks import RankPool
from safetensors.torch import load_file
from tiny_runs import all_rows, tiny_tree, train_here, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from erollout import UserError, find_policy

ONE_RANK = ("parallel.world_size=1", "parallel.pipeline_model_parallel_size=1")


def invoke_here(*arguments: str) -> Outcome:
    """For RankPool.run(1, ...)."""
    return invoke(*arguments)


@pytest.fixture(scope="module")
def run(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints after two and four; its base model is gone."""
    folder = tmp_path_factory.mktemp("saved")
    model, tokenizer = folder / "model", folder / "tokenizer"
    model.mkdir()
    save_random_model(model)
    tree = tiny_tree(
        folder,
        model={"architecture": None, "path": str(model)},
        parallel={"world_size": 2, "pipeline_model_parallel_size": 2},
        train={"steps": 4, "output_dir": str(folder / "run")},
        evaluation={"interval": 2, "num_prompts": 6},
        checkpoint={"interval": 2, "export_path": str(folder / "exported")},
    )
    assert tree["model"]["tokenizer"] == str(tokenizer)
    rank_pool.run(2, train_here, tree)
    shutil.rmtree(model)
    return folder / "run"


def _on_one_rank(pool: RankPool, *arguments: str) -> Outcome:
    ended: Outcome = pool.run(1, invoke_here, *arguments)[0]
    assert ended.status == 0, ended.stderr
    return ended


@pytest.mark.distributed
def test_the_newest_checkpoint_is_exported_as_the_run_itself_exports(run: Path, rank_pool: RankPool, tmp_path: Path) -> None:
    ended = _on_one_rank(rank_pool, "export", "--run", str(run), "--out", str(tmp_path / "out"))
    assert "after 4 steps" in ended.stdout
    ours, own = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run.parent / "exported"))
    assert ours.keys() == own.keys() and all(torch.equal(ours[name], own[name]) for name in own)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", run.parent / "exported")]
    assert configs[0] == configs[1]
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("1+2=", return_tensors="pt").input_ids
    logits = [AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (tmp_path / "out", run.parent / "exported")]
    assert torch.equal(*logits)
    line = invoke("export", "--run", str(run), "--out", str(tmp_path / "out")).error()
    assert "--out" in line and "not an empty directory" in line


@pytest.mark.distributed
def test_generate_takes_a_run_and_what_is_exported_from_it(run: Path, rank_pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export = ("export", "--run", str(run), "--step", "2", "--out", str(tmp_path / "out"), "--dtype", "bfloat16")
    _on_one_rank(rank_pool, *export)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    options = ("--prompt", "1+2=", "--max-tokens", "8", "--json", "rollout.kv_cache_gib=0.01")
    texts = [
        _on_one_rank(rank_pool, "generate", *policy, *options).stdout
        for policy in (["--model", str(tmp_path / "out")], ["--run", str(run), "--step", "2"], ["--run", str(run)])
    ]
    assert texts[0] == texts[1] and texts[1] != texts[2]


def rollout_here(run: str, out: str) -> None:
    """For RankPool.run: the newest checkpoint in the run's own layout."""
    from erollout.api import sampling

    saved = find_policy(run)
    sampling.report(saved.config, saved, out)


@pytest.mark.distributed
def test_two_ranks_read_a_checkpoint_as_one_does(run: Path, rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(2, rollout_here, str(run), str(tmp_path / "two.jsonl"))
    _on_one_rank(rank_pool, "rollout", "--run", str(run), "--out", str(tmp_path / "one.jsonl"), *ONE_RANK)
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    assert invoke("config", "diff", str(run), str(run)).stdout == "no difference\n"


def rollout_of_another(run: str, out: str) -> None:
    """For RankPool.run(2, ...): rank 1 has found an older checkpoint than rank 0, as while a run goes on."""
    import torch.distributed as dist

    from erollout.api import sampling

    saved = find_policy(run, step=2 if dist.get_rank() else 4)
    sampling.report(saved.config, saved, out)


@pytest.mark.distributed
def test_ranks_that_found_different_checkpoints_sample_from_that_of_rank_0(
    run: Path, rank_pool: RankPool, tmp_path: Path
) -> None:
    rank_pool.run(2, rollout_here, str(run), str(tmp_path / "newest.jsonl"))
    rank_pool.run(2, rollout_of_another, str(run), str(tmp_path / "another.jsonl"))
    assert (tmp_path / "another.jsonl").read_text() == (tmp_path / "newest.jsonl").read_text()


@pytest.mark.distributed
def test_an_evaluation_repeats_that_of_the_run(run: Path, rank_pool: RankPool, tmp_path: Path) -> None:
    own = {row["step"]: row for row in all_rows(run.parent) if "evaluation/reward_mean" in row}
    for step, which in ((2, ["--step", "2"]), (4, [])):
        out = tmp_path / f"{step}.jsonl"
        ended = _on_one_rank(rank_pool, "evaluate", *which, "--run", str(run), "--out", str(out), *ONE_RANK)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert sum(row["reward"] for row in rows) / len(rows) == pytest.approx(own[step]["evaluation/reward_mean"], abs=1e-12)
        length = sum(len(row["response_ids"]) for row in rows) / len(rows)
        assert length == pytest.approx(own[step]["evaluation/response_length_mean"])
        assert {row["policy_version"] for row in rows} == {step} and all(row["prompt"] and row["reference"] for row in rows)
        for words in ("6 of 200 (evaluation.num_prompts)", "accuracy (pass@1)", "truncated", f"step_{step:08d}", "tokens/s"):
            assert words in ended.stdout, ended.stdout


@pytest.mark.distributed
def test_rows_of_ones_own_are_all_sampled(run: Path, rank_pool: RankPool, tmp_path: Path) -> None:
    rows = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(7)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = ["--test", str(tmp_path / "rows.jsonl")]
    for value in (["data.args.x1=2"], ["rewards.threshold", "=", "1"], ["rollout.stop=[a, b]"], ["rollout.stop =", "[a, b]"]):
        line = invoke("evaluate", "--run", str(run), *file, *value, "model.typo=1").error()
        assert "typo" in line, f"{value} is no file: {line}"
    test = [*file, "data.prompt_column=question", "rewards.function=null", *ONE_RANK]
    dry = invoke("evaluate", "--run", str(run), *test, "--dry-run").stdout
    assert "7 rows to test on" in dry and "to train on" not in dry and "0+1=" in dry
    (run / "verdict").unlink()
    (run / "verdict").mkdir()  # nothing is written into the run
    ended = _on_one_rank(rank_pool, "evaluate", "--run", str(run), *test)
    (run / "verdict").rmdir()
    assert "│ 7" in ended.stdout and not (tmp_path / "out.jsonl").exists()
    model = ["--model", str(run.parent / "exported"), "--out", str(tmp_path / "out.jsonl"), *test]
    sizes = ["rollout.kv_cache_gib=0.01", "rollout.max_prompt_tokens=16", "rollout.max_tokens=8"]
    _on_one_rank(rank_pool, "evaluate", *model, *sizes)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in found] == [row["question"] for row in rows]
    assert [row["reference"] for row in found] == [row["answer"] for row in rows]


@pytest.mark.distributed
def test_what_a_run_does_not_have_is_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun" / "tracking").mkdir(parents=True)
    (tmp_path / "begun" / "tracking" / "metrics.jsonl").write_text("")
    config, export = str(write_config(tmp_path)), ("export", "--out", str(tmp_path / "out"))
    for arguments, words in (
        ([*export, "--run", str(tmp_path / "none")], ["--run", "none is no directory"]),
        ([*export, "--run", str(tmp_path / "empty")], ["holds no run", "train.output_dir"]),
        ([*export, "--run", str(tmp_path / "begun")], ["has no checkpoint", "checkpoint.interval"]),
        ([*export, "--run", str(run), "--step", "3"], ["--step = 3", "there are 2, 4"]),
        (["generate", "--prompt", "1", "--run", str(run), "--step", "1"], ["--step = 1", "there are 2, 4"]),
        (["generate", "--prompt", "1", "--model", ""], ["model.path"]),
        (["export", "--run", str(run), "--out", str(tmp_path / "taken")], ["--out", "not an empty directory"]),
        ([*export, "--run", str(run), "model.tokenizer=nowhere"], ["model.tokenizer"]),
        (["evaluate"], ["no policy is named", "--run DIR"]),
        (["evaluate", "--model", "m"], ["--model needs test data", "--test FILE"]),
        (["evaluate", "--config", config, "--run", str(run)], ["--run and --config"]),
        (["rollout", "--config", config, "--step", "2", "--out", "o"], ["--step = 2", "give --run DIR too"]),
        (["evaluate", "--run", str(run), "--test", str(tmp_path / "no.jsonl"), *ONE_RANK], ["no.jsonl", "No such file"]),
    ):
        outcome = invoke(*arguments)
        line = outcome.error()
        assert outcome.status == 2 and all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


@pytest.mark.distributed
def test_damaged_and_former_checkpoints_are_refused(run: Path, rank_pool: RankPool, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest = copy / "checkpoints" / "step_00000004"
    file = next(newest.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    ended = rank_pool.run(1, invoke_here, "export", "--run", str(copy), "--out", str(tmp_path / "out"))[0]
    assert "is damaged" in ended.error() and "--step" in ended.error() and not (tmp_path / "out").exists()
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({key: state[key] for key in state if key != "configuration"}))
    with pytest.raises(UserError, match="saved no configuration"):
        find_policy(copy)
    older = copy / "checkpoints" / "step_00000002" / "state.json"
    state = json.loads(older.read_text())
    state["configuration"] |= {"train.key_of_another_version": 1}
    older.write_text(json.dumps(state))
    assert find_policy(copy, 2).config.train.output_dir == str(copy)
