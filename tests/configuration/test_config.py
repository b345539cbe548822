"""The configuration: what is shipped loads, what can't be honoured is refused in one line that names key and value."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from erollout.config import Config, build_config, load_config
from erollout.engine.sampling.random import request_seed
from erollout.errors import UserError
from erollout.parallel.layout import DecodeLayout, TrainLayout

CONFIGS = sorted(path for path in (Path(__file__).parents[2] / "configs").rglob("*") if path.suffix in (".yaml", ".yml"))
MINIMAL = {"model": {"path": "m"}, "data": {"kind": "chain_sum_cot"}}


def _build(**sections) -> Config:
    return build_config({name: MINIMAL.get(name, {}) | sections.get(name, {}) for name in {**MINIMAL, **sections}})


def _error(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as raised:
        call(*args, **kwargs)
    message = str(raised.value)
    assert message and "\n" not in message
    return message


def _file(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_configs_are_shipped() -> None:
    assert len(CONFIGS) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads_and_fits_its_world(path: Path) -> None:
    config = load_config(path)
    tensor, pipeline = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    world_size = config.parallel.world_size or tensor * pipeline
    train = TrainLayout(world_size, tensor, pipeline)
    DecodeLayout(world_size, config.rollout.tensor_model_parallel_size)
    assert (config.train.global_batch_size or config.samples_per_step) >= train.data


def test_defaults_are_filled_in_and_values_typed() -> None:
    config = _build(optimizer={"lr": "1e-5"}, rollout={"stop": ["a", "b"]}, data={"tasks": [{"name": "x", "weight": 2}]})
    assert config.optimizer.lr == 1e-5 and config.rollout.stop == ("a", "b")
    assert config.data.tasks[0].weight == 2.0 and config.data.tasks[0].args == {}
    assert config.train.steps == Config().train.steps
    assert config.tokenizer_path == "m"
    assert config.samples_per_step == config.rollout.prompts_per_step * config.rollout.group_size


def test_a_config_can_not_be_changed() -> None:
    with pytest.raises(AttributeError):
        _build().train.steps = 3  # type: ignore[misc]


def test_a_config_survives_the_trip_through_a_dict() -> None:
    config = _build(rollout={"group_size": 4}, data={"tasks": [{"name": "x"}]})
    assert build_config(config.to_dict()) == config


@pytest.mark.parametrize(
    ("sections", "unknown", "nearest"),
    [
        ({"train": {"stesp": 3}}, "train.stesp", "train.steps"),
        ({"trian": {}}, "trian", "train"),
        ({"train": {"lr": 1e-3}}, "train.lr", "optimizer.lr"),  # right key, wrong section
        ({"parallel": {"tensor_parallel_size": 2}}, "parallel.tensor_parallel_size", "parallel.tensor_model_parallel_size"),
        ({"data": {"tasks": [{"nmae": "x"}]}}, "data.tasks.0.nmae", "data.tasks.name"),
    ],
)
def test_an_unknown_key_names_the_nearest(sections: dict, unknown: str, nearest: str) -> None:
    message = _error(_build, **sections)
    assert f"unknown key {unknown};" in message and message.endswith(f"did you mean {nearest}?")


def test_an_unknown_key_with_no_neighbour_says_where_the_keys_are() -> None:
    assert "unknown key train.xxyyzz; `erollout config keys`" in _error(_build, train={"xxyyzz": 1})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "steps", "many"),
        ("train", "steps", 0),
        ("train", "steps", 2.5),
        ("train", "steps", True),
        ("train", "steps", None),
        ("train", "max_tokens_per_micro_batch", -1),
        ("rollout", "temperature", -0.1),
        ("rollout", "temperature", float("inf")),
        ("rollout", "top_p", 0),
        ("rollout", "top_p", 1.5),
        ("rollout", "stop", {"a": 1}),
        ("train", "output_dir", "a\0b"),
        ("train", "output_dir", ""),
        ("optimizer", "lr", 0),
        ("optimizer", "lr", float("nan")),
        ("optimizer", "lr", [1]),
        ("optimizer", "adam_beta2", 1.0),
        ("algorithm", "name", "ppo"),
        ("algorithm", "kl_estimator", "k4"),
        ("model", "dtype", "float16\n"),
        ("model", "path", 7),
        ("tracking", "enabled", "perhaps"),
        ("data", "args", 3),
    ],
)
def test_a_value_of_wrong_type_or_bound_is_named(section: str, key: str, value: object) -> None:
    assert f"{section}.{key} = {value!r}: " in _error(_build, **{section: {key: value}})


def test_a_missing_key_is_named() -> None:
    assert "data.tasks.0.name: " in _error(_build, data={"tasks": [{"weight": 1}]})


@pytest.mark.parametrize("tree", [{"train": 5}, {"train": None}, {"train": {1: 2}}, {1: 2}], ids=str)
def test_a_tree_of_another_shape_is_refused(tree: dict) -> None:
    _error(build_config, MINIMAL | tree)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"architecture": {"model_type": "llama"}}}, ["model.path", "model.architecture"]),
        ({"model": {"path": None}}, ["model.path", "model.architecture"]),
        ({"model": {"path": None, "architecture": {"model_type": "llama"}}}, ["model.tokenizer"]),
        ({"data": {"kind": "file"}}, ["data.train_files", "data.kind = file"]),
        ({"data": {"kind": "reasoning_gym"}}, ["data.tasks", "data.kind = reasoning_gym"]),
        ({"data": {"instruction": "Question:"}}, ["data.instruction = 'Question:'", "{prompt}"]),
        ({"data": {"train_seed": 0, "train_size": 11, "test_seed": 10}}, ["[0, 11)", "[10, 210)", "data.test_seed"]),
        ({"data": {"train_seed": 209, "train_size": 1, "test_seed": 10}}, ["[209, 210)", "[10, 210)"]),
        ({"train": {"global_batch_size": 100}}, ["train.global_batch_size = 100", "rollout.group_size = 256"]),
        ({"train": {"global_batch_size": 512}}, ["train.global_batch_size = 512"]),
        ({"rollout": {"temperature": 0}}, ["rollout.temperature = 0", "evaluation.temperature"]),
        ({"optimizer": {"lr": 1e-5, "min_lr": 1e-4}}, ["optimizer.min_lr = 0.0001", "optimizer.lr = 1e-05"]),
        ({"parallel": {"sequence_parallel": True}}, ["parallel.sequence_parallel", "parallel.tensor_model_parallel_size"]),
    ],
)
def test_keys_that_do_not_go_together_are_refused(sections: dict, words: list[str]) -> None:
    message = _error(_build, **sections)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"path": None, "architecture": {"model_type": "llama"}, "tokenizer": "t"}},
        {"data": {"train_seed": 0, "train_size": 10, "test_seed": 10}},
        {"data": {"train_seed": 210, "train_size": 10, "test_seed": 10}},
        {"train": {"global_batch_size": 64}},
        {"rollout": {"temperature": 0, "group_size": 1}},
    ],
)
def test_keys_at_the_edge_of_what_goes_together_are_taken(sections: dict) -> None:
    _build(**sections)


@pytest.mark.parametrize("seed", [2**31, 2**63 - 1])
def test_any_seed_that_the_noise_can_tell_apart_is_taken(seed: int) -> None:
    torch.Generator().manual_seed(seed + 2**20)  # Megatron adds ranks and constants
    others = {request_seed(2 * (seed - n) + stream, 0, 0) for n in range(1, 100) for stream in (0, 1)}
    assert len(others) == 198 and request_seed(2 * seed, 0, 0) not in others
    assert _build(train={"seed": seed}).train.seed == seed
    assert _build(data={"kind": "chain_sum_cot", "train_seed": seed}).data.train_seed == seed
    assert "train.seed" in _error(_build, train={"seed": 2**63})


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = _file(tmp_path, "model: {path: m}\ndata: {kind: chain_sum_cot}\noptimizer: {lr: 1e-5}\n")
    values = {"optimizer.lr": "2e-4", "train.steps": "7", "rollout.stop": "[a, b]", "model.tokenizer": "a=b"}
    values |= {"tracking.enabled": "false", "model.path": "n"}
    config = load_config(path, [f"{key}={value}" for key, value in values.items()])
    assert config.optimizer.lr == 2e-4 and config.train.steps == 7 and config.rollout.stop == ("a", "b")
    assert config.model.tokenizer == "a=b" and config.model.path == "n" and not config.tracking.enabled
    assert load_config(path).optimizer.lr == 1e-5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", ["'train.steps'", "section.key=value"]),
        ("=3", ["'=3'", "section.key=value"]),
        ("train.stesp=3", ["train.stesp", "train.steps"]),
        ("train.steps=x", ["train.steps = 'x'"]),
        ("train.steps=", ["train.steps = None"]),
        ("train.steps.more=3", ["steps is a value"]),
        ("train.steps=[", ["train.steps = '['"]),
        ("train.steps=[1, [2]", ["train.steps = '[1, [2]'", "expected ',' or ']'"]),
        ("rollout.stop=[a, [b]", ["rollout.stop = '[a, [b]'", "expected ',' or ']'"]),
        ("data.args={a: 1, a: 2}", ["duplicate key a"]),
        ("train .steps=3", ["'train .steps=3'", "section.key=value"]),
    ],
)
def test_overrides_that_can_not_be_applied_are_refused(tmp_path: Path, override: str, words: list[str]) -> None:
    path = _file(tmp_path, "model: {path: m}\ndata: {kind: chain_sum_cot}\ntrain: {steps: 5}\n")
    message = _error(load_config, path, [override])
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {path: m\ntrain: [", ["not valid YAML"]),
        ("- a\n- b\n", ["mapping", "list"]),
        ("just text", ["mapping", "str"]),
        ("model: {path: m\x00}", ["not valid YAML"]),
        (b"model: {path: \xff}", ["not UTF-8"]),
        ("", ["model.path"]),
    ],
    ids=["broken", "list", "text", "control character", "latin-1", "empty"],
)
def test_files_that_are_no_config_are_refused(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    message = _error(load_config, _file(tmp_path, text))
    assert all(word in message for word in words), message


def test_files_that_can_not_be_read_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        assert str(path) in _error(load_config, path)


def test_speculation_can_be_switched_off_as_yaml_writes_it(tmp_path: Path) -> None:
    for written in ("off", "'off'", "false"):
        file = tmp_path / "config.yaml"
        file.write_text(f"model: {{path: ~/policy}}\ndata: {{kind: chain_sum_cot}}\nspeculation: {{mode: {written}}}\n")
        assert load_config(file).speculation.mode == "off"
    assert load_config(file, ["speculation.mode=always"]).speculation.mode == "always"
    assert load_config(file, ["speculation.mode=off"]).speculation.mode == "off"


def test_a_tilde_is_the_home_directory(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: ~/policy}\ndata: {kind: chain_sum_cot}\ntrain: {output_dir: ~/run}\n")
    config = load_config(file)
    assert config.model.path == str(Path.home() / "policy") and config.train.output_dir == str(Path.home() / "run")


def test_a_misspelt_key_of_the_drafter_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: x}\ndata: {kind: chain_sum_cot}\nspeculation: {drafter: {formt: w8a8}}\n")
    with pytest.raises(UserError, match=r"speculation\.drafter\.formt; did you mean speculation\.drafter\.format\?"):
        load_config(file)


def test_auto_needs_tokens_to_choose_by() -> None:
    drafter = {"format": "auto", "statistics_tokens": 0}
    assert "statistics_tokens = 0" in _error(_build, speculation={"mode": "always", "drafter": drafter})


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"speculation": {"mode": "toggle", "drafter": {"alternatives": ["w8a8"]}}}, "mode = toggle drafts with one format"),
        ({"speculation": {"toggle": {"ladder": {"rungs": [5, 3]}}}}, "rungs = \\[5, 3\\] must ascend"),
        ({"speculation": {"toggle": {"ladder": {"rungs": []}}}}, "with at least one"),
        ({"speculation": {"toggle": {"ladder": {"lower_below": 0.99}}}}, "lower_below = 0.99 is above raise_above = 0.94"),
        ({"coordinator": {"lock_step": True}}, "policy = makespan: replicas that share collectives"),
        ({"coordinator": {"polcy": "cluster"}}, "coordinator.polcy; did you mean coordinator.policy"),
        ({"speculation": {"toggle": {"ladder": {"rung": [3]}}}}, "did you mean speculation.toggle.ladder.rungs"),
        ({"speculation": {"mode": "togle"}}, "'off', 'always', 'toggle', 'adaptive' or 'ladder'"),
    ],
)
def test_choices_that_can_not_go_together_are_named(sections: dict[str, Any], words: str) -> None:
    assert re.search(words, _error(_build, **sections))
