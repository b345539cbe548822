"""Checkpoints in and out: bit-exact under every layout, and refused by name when they are wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from erollout.config import ModelConfig
from erollout.errors import UserError
from erollout.parallel.layout import TrainLayout
from erollout.policy.architecture import Architecture
from erollout.policy.families import policy_architecture, read_architecture
from erollout.policy.hf_export import export_policy, plan_shards
from erollout.policy.hf_io import check_weights, load_weights
from erollout.policy.initialization import initialize_weights
from erollout.policy.training_layout import training_placement

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES, "bos_token_id": 1, "eos_token_id": [2, 3]},
    "qwen2-tied": {"model_type": "qwen2", **SIZES, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 16, "max_position_embeddings": 256},
}
LAYOUTS = [(1, 1, 1), (2, 2, 1), (2, 1, 2), (2, 1, 1)]
"""(world size, tensor, pipeline): the last has two data-parallel ranks."""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each model as transformers saves it, in float32, once as a single file and once in shards."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("checkpoints")
    for name, config in MODELS.items():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        for parameter in model.parameters():
            parameter.data.normal_()
        model.save_pretrained(folder / name)
        model.save_pretrained(folder / f"{name}-sharded", max_shard_size="20KB")
        (folder / name / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "tensor", "pipeline"), LAYOUTS)
def test_load_and_export_is_bit_exact(rank_pool, checkpoints: Path, tmp_path: Path, world_size, tensor, pipeline) -> None:
    from transformers import AutoModelForCausalLM

    jobs = [(str(checkpoints / source), str(tmp_path / source)) for name in MODELS for source in (name, f"{name}-sharded")]
    rank_pool.run(world_size, _round_trip, jobs, tensor, pipeline, "float32", 20_000)
    for source, target in jobs:
        assert len(list(Path(target).glob("model-*.safetensors"))) > 1
        assert not list(tmp_path.glob(".*"))
        first, second = (AutoModelForCausalLM.from_pretrained(path) for path in (source, target))
        assert first.config.eos_token_id == second.config.eos_token_id
        ours, theirs = first.state_dict(), second.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (tmp_path / "llama" / "tokenizer.json").read_text() == "{}"


@pytest.mark.distributed
def test_export_in_bfloat16_rounds_once_and_fits_one_file(rank_pool, checkpoints: Path, tmp_path: Path) -> None:
    source = checkpoints / "llama"
    rank_pool.run(2, _round_trip, [(str(source), str(tmp_path / "out"))], 2, 1, "bfloat16", 1 << 30)
    expected, written = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert expected.keys() == written.keys() and not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert all(torch.equal(written[name], expected[name].bfloat16()) for name in expected)
    assert policy_architecture(ModelConfig(path=str(tmp_path / "out"))) == policy_architecture(ModelConfig(path=str(source)))


@pytest.mark.distributed
def test_an_export_that_fails_says_so_on_every_rank_and_harms_nothing(rank_pool, checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    source = str(checkpoints / "llama")
    for target in ("mine", "file", "file/below", "/dev/full/model"):
        messages = rank_pool.run(2, _export_error, source, str(tmp_path / target), 2, 1)
        assert len(set(messages)) == 1 and str(tmp_path / target) in messages[0]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]


@pytest.mark.distributed
def test_an_earlier_export_survives_a_full_disk_and_is_replaced_otherwise(rank_pool, checkpoints: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    rank_pool.run(2, _round_trip, [(str(checkpoints / "llama"), str(target))], 2, 1, "float32", 20_000)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    messages = rank_pool.run(2, _export_without_space, str(checkpoints / "llama"), str(target), 2, 1)
    assert len(set(messages)) == 1 and str(target) in messages[0] and "\n" not in messages[0]
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    rank_pool.run(2, _round_trip, [(str(checkpoints / "llama"), str(target))], 2, 1, "bfloat16", 1 << 30)
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in target.iterdir()) == names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    target.rename(tmp_path / ".out.replaced")  # as if killed between the two renames
    assert "can't write" in rank_pool.run(2, _export_without_space, str(checkpoints / "llama"), str(target), 2, 1)[0]
    assert sorted(path.name for path in target.iterdir()) == names


def test_shards_are_as_full_as_they_may_be() -> None:
    architecture = read_architecture(MODELS["llama"], "test")
    plan = plan_shards(architecture, 4, 20_000)
    assert [name for names in plan for name in names] == list(architecture.logical_tensors())
    sizes = {name: 4 * torch.Size(shape).numel() for name, shape in architecture.logical_tensors().items()}
    totals = [sum(sizes[name] for name in names) for names in plan]
    assert max(totals) <= 20_000
    assert all(total + sizes[following[0]] > 20_000 for total, following in zip(totals, plan[1:], strict=False))
    assert all(len(names) == 1 for names in plan_shards(architecture, 4, 1))


def test_padding_is_zero_and_dtype_converts(checkpoints: Path) -> None:
    architecture = policy_architecture(ModelConfig(path=str(checkpoints / "llama")))
    layout = TrainLayout(2, 2, 1)
    placement = training_placement(architecture, layout, 1)
    tensors = {local.name: torch.full(local.shape, float("nan"), dtype=torch.bfloat16) for local in placement}
    load_weights(checkpoints / "llama", architecture, placement, tensors)
    embedding = load_file(checkpoints / "llama" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(tensors["embedding.word_embeddings.weight"][:33], embedding[34:].bfloat16())
    assert tensors["embedding.word_embeddings.weight"][33:].count_nonzero() == 0
    assert all(not tensor.isnan().any() for tensor in tensors.values())
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    initialize_weights(architecture, placement, tensors, seed=1)
    assert all(not tensor.isnan().any() for tensor in tensors.values())
    assert tensors["output_layer.weight"][33:].count_nonzero() == 0


def test_old_buffers_and_a_redundant_output_layer_are_accepted(checkpoints: Path, tmp_path: Path) -> None:
    folder, weights = _copy(checkpoints / "qwen2-tied", tmp_path)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    assert _load(folder)["embedding.word_embeddings.weight"].equal(weights["lm_head.weight"])


def _drop(name: str):
    return lambda weights: weights.pop(name)


WRONG = {
    "missing": (_drop("model.layers.1.mlp.up_proj.weight"), "lacks tensor model.layers.1.mlp.up_proj.weight"),
    "unexpected": (lambda w: w.update(extra=torch.ones(1)), "has tensor extra"),
    "bias": (lambda w: w.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(32)}), "o_proj.bias"),
    "shape": (lambda w: w.update({"model.norm.weight": torch.ones(31)}), r"model.norm.weight is \[31\].*\[32\]"),
    "dtype": (lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "model.norm.weight is I8"),
    "untied": (lambda w: w.update({"lm_head.weight": torch.ones(67, 32)}), "lm_head.weight differs from model.embed_tokens"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_weights_of_another_model_are_refused(checkpoints: Path, tmp_path: Path, kind: str) -> None:
    change, message = WRONG[kind]
    folder, weights = _copy(checkpoints / "qwen2-tied", tmp_path)
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=message) as error:
        _load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_files_are_refused(checkpoints: Path, tmp_path: Path, keep: int) -> None:
    folder, _ = _copy(checkpoints / "llama-sharded", tmp_path)
    victim = sorted(folder.glob("model-*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{victim.name} is truncated"):
        _load(folder)
    with pytest.raises(UserError, match=f"{victim.name} is truncated"):
        check_weights(folder, policy_architecture(ModelConfig(path=str(folder))))


def test_incomplete_directories_are_refused(checkpoints: Path, tmp_path: Path) -> None:
    folder, _ = _copy(checkpoints / "llama-sharded", tmp_path)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    victim = sorted(folder.glob("model-*.safetensors"))[1]
    elsewhere = sorted(folder.glob("model-*.safetensors"))[0]
    moved = next(name for name, file in content["weight_map"].items() if file == victim.name)
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], moved: elsewhere.name}}))
    with pytest.raises(UserError, match=f"{elsewhere.name} lacks tensor {moved}"):
        _load(folder)
    index.write_text(json.dumps(content))
    victim.unlink()
    with pytest.raises(UserError, match=f"{victim.name} is missing"):
        _load(folder)
    index.write_text("{}")
    with pytest.raises(UserError, match="not a readable index"):
        _load(folder)
    index.unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        _load(folder)


def _copy(source: Path, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    single = folder / "model.safetensors"
    return folder, load_file(single) if single.exists() else {}


def _tensors(architecture: Architecture, placement: Any) -> dict[str, torch.Tensor]:
    return {local.name: torch.full(local.shape, float("nan")) for local in placement}


def _load(folder: Path) -> dict[str, torch.Tensor]:
    architecture = policy_architecture(ModelConfig(path=str(folder)))
    placement = training_placement(architecture, TrainLayout(1, 1, 1), 0)
    tensors = _tensors(architecture, placement)
    load_weights(folder, architecture, placement, tensors)
    return tensors


def _loaded(source: str, tensor: int, pipeline: int) -> tuple[Architecture, TrainLayout, dict[str, torch.Tensor]]:
    import torch.distributed as dist

    layout = TrainLayout(dist.get_world_size(), tensor, pipeline)
    architecture = policy_architecture(ModelConfig(path=source))
    placement = training_placement(architecture, layout, dist.get_rank())
    tensors = _tensors(architecture, placement)
    load_weights(source, architecture, placement, tensors)
    return architecture, layout, tensors


def _round_trip(jobs: list[tuple[str, str]], tensor: int, pipeline: int, dtype: str, max_shard_bytes: int) -> None:
    for source, target in jobs:
        architecture, layout, tensors = _loaded(source, tensor, pipeline)
        tokenizer = source if (Path(source) / "tokenizer.json").exists() else None
        export_policy(target, architecture, layout, tensors, dtype, tokenizer, max_shard_bytes)


def _export_error(source: str, target: str, tensor: int, pipeline: int) -> str:
    try:
        export_policy(target, *_loaded(source, tensor, pipeline), "float32")
    except UserError as error:
        return str(error)
    return "no error"


def _export_without_space(source: str, target: str, tensor: int, pipeline: int) -> str:
    """The same with a limit on the size of files, which a write hits as it would a full disk."""
    import resource
    import signal

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        return _export_error(source, target, tensor, pipeline)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
