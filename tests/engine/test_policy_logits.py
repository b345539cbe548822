"""The policy computes what transformers computes, under every layout, and starts from the same random weights under each."""

from pathlib import Path
from typing import Any

import pytest
import torch

from erollout.config import ModelConfig, ParallelConfig
from erollout.errors import UserError
from erollout.policy.families import policy_architecture, read_architecture
from erollout.policy.initialization import initial_tensor

SIZES: dict[str, Any] = {
    "vocab_size": 67,  # padded to 68 under two tensor-parallel ranks
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES, "tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", **SIZES, "tie_word_embeddings": True},
    "llama3-wide-heads": {"model_type": "llama", **SIZES, "rope_parameters": LLAMA3, "head_dim": 32, "rms_norm_eps": 1e-5},
    "qwen2": {"model_type": "qwen2", **SIZES, "num_attention_heads": 4},
    "qwen2-tied": {"model_type": "qwen2", **SIZES, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 16},
    "qwen3-tied": {"model_type": "qwen3", **SIZES, "tie_word_embeddings": True, "head_dim": 8},
}
LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of transformers per model, with its logits for the same tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("references")
    for seed, (name, config) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager")
        for parameter in model.parameters():  # biases and norms too: their defaults would hide a wrong place
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder / name)
        with torch.no_grad():
            torch.save(model(_tokens()).logits, folder / name / "logits.pt")
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers(rank_pool, references: Path, layout: str) -> None:
    tensor, pipeline = LAYOUTS[layout]
    configs = {name: {"path": str(references / name)} for name in MODELS}
    shards = rank_pool.run(tensor * pipeline, _logits, configs, tensor, pipeline, False)
    for name in MODELS:
        logits = torch.cat([shard[name] for shard in shards if shard], dim=-1)[..., : SIZES["vocab_size"]]
        reference = torch.load(references / name / "logits.pt")
        assert reference.abs().max() > 1
        assert (logits - reference).abs().max() < 1e-4, name


@pytest.mark.distributed
def test_sequence_parallel_changes_nothing(rank_pool, references: Path) -> None:
    names = ("qwen2", "qwen3")
    shards = rank_pool.run(2, _logits, {name: {"path": str(references / name)} for name in names}, 2, 1, True)
    for name in names:
        logits = torch.cat([shard[name] for shard in shards], dim=-1)[..., : SIZES["vocab_size"]]
        assert (logits - torch.load(references / name / "logits.pt")).abs().max() < 1e-4


@pytest.mark.distributed
def test_random_weights_are_the_same_under_every_layout(rank_pool) -> None:
    configs = {name: {"architecture": config} for name, config in MODELS.items()}
    runs = {name: rank_pool.run(t * p, _logits, configs, t, p, False) for name, (t, p) in LAYOUTS.items()}
    for model in MODELS:
        logits = {
            layout: torch.cat([shard[model] for shard in shards if shard], -1)[..., : SIZES["vocab_size"]]
            for layout, shards in runs.items()
        }
        assert torch.equal(logits["tp1"], logits["pp2"])
        assert (logits["tp1"] - logits["tp2"]).abs().max() < 1e-5
        assert logits["tp1"].std() > 0.01


@pytest.mark.distributed
def test_model_parameters_are_those_of_the_placement_and_marked_for_gradient_norms(rank_pool) -> None:
    for name in ("llama-tied", "qwen2", "qwen3"):
        for tensor, pipeline in LAYOUTS.values():
            for placed, found in rank_pool.run(tensor * pipeline, _parameters, MODELS[name], tensor, pipeline):
                assert [entry[:2] for entry in found] == placed
                sharded = {entry[0] for entry in found if entry[2]}
                assert sharded == {entry[0] for entry in found if "layernorm" not in entry[0]}


def test_initial_weights_have_their_scale_and_depend_on_name_and_seed() -> None:
    shape = (64, 512)
    up, down = (initial_tensor(f"model.layers.0.mlp.{name}_proj.weight", shape, 8, 1) for name in ("up", "down"))
    assert up.std().item() == pytest.approx(0.02, rel=0.05)
    assert down.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    again = initial_tensor("model.layers.0.mlp.up_proj.weight", shape, 8, 1)
    assert torch.equal(up, again)
    assert not torch.equal(up, initial_tensor("model.layers.0.mlp.up_proj.weight", shape, 8, 2))
    assert not torch.equal(up, initial_tensor("model.layers.1.mlp.up_proj.weight", shape, 8, 1))
    assert torch.equal(initial_tensor("model.norm.weight", (4,), 8, 1), torch.ones(4))


def test_sequence_parallel_without_tensor_parallel_is_refused() -> None:
    from erollout.policy.model import transformer_config

    architecture = read_architecture(MODELS["llama"], "test")
    with pytest.raises(UserError, match="sequence_parallel"):
        transformer_config(architecture, ModelConfig(), ParallelConfig(sequence_parallel=True))


def _tokens() -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (2, 96), generator=torch.Generator().manual_seed(7))


def _build(model: ModelConfig, tensor: int, pipeline: int, sequence_parallel: bool = False) -> tuple[Any, Any]:
    """(GPTModel with its weights, placement) of this rank."""
    import torch.distributed as dist

    from erollout.megatron_patches import apply_all

    apply_all()
    from megatron.core import parallel_state, tensor_parallel

    from erollout.parallel.layout import TrainLayout
    from erollout.policy.initialization import first_weights
    from erollout.policy.model import build_model, local_tensors, transformer_config
    from erollout.policy.training_layout import training_placement

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(tensor, pipeline)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    architecture = policy_architecture(model)
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, sequence_parallel=sequence_parallel
    )
    placement = training_placement(architecture, TrainLayout(dist.get_world_size(), tensor, pipeline), dist.get_rank())
    module = build_model(architecture, transformer_config(architecture, model, parallel))
    first_weights(local_tensors(module), architecture, model, placement, seed=1)
    return module, placement


def _logits(models: dict[str, dict[str, Any]], tensor: int, pipeline: int, sequence_parallel: bool) -> dict[str, torch.Tensor]:
    """This rank's columns of the logits of each model; empty but on the last pipeline stage."""
    return {
        name: logits
        for name, model in models.items()
        if (logits := _forward(_build(ModelConfig(**model), tensor, pipeline, sequence_parallel)[0])) is not None
    }


def _forward(model: Any) -> torch.Tensor | None:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(iterator: Any, stage: Any) -> Any:
        tokens = next(iterator)
        output = stage(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
        return output, lambda logits, non_loss_data: logits

    with torch.no_grad():
        result = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([_tokens()]),
            model=model,
            num_microbatches=1,
            seq_length=_tokens().shape[1],
            micro_batch_size=len(_tokens()),
            forward_only=True,
            collect_non_loss_data=True,
        )
    return result[0] if result else None


def _parameters(config: dict[str, Any], tensor: int, pipeline: int) -> tuple[list, list]:
    model, placement = _build(ModelConfig(architecture=config), tensor, pipeline)
    placed = [(local.name, local.shape) for local in placement]
    marked = "tensor_model_parallel"
    return placed, [(n, tuple(p.shape), getattr(p, marked, False)) for n, p in model.named_parameters()]
