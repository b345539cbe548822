"""Tiny random models as transformers' modules, and decode engines that hold the same weights."""

from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from erollout.config import RolloutConfig
from erollout.engine.engine import Engine
from erollout.engine.model.decode_layout import decode_placement
from erollout.parallel.placement import box_slices
from erollout.policy.families import read_architecture

torch.set_num_threads(1)  # as every rank has it: float32 products have reproducible bits only so

MAX_MODEL_LEN = 512
SIZES: dict[str, Any] = {
    "vocab_size": 97,  # odd: the vocabulary is padded under two ranks
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES, "tie_word_embeddings": False},
    "llama3-tied-wide": {
        "model_type": "llama",
        **SIZES,
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3,
        "head_dim": 32,
    },
    "qwen2-tied": {"model_type": "qwen2", **SIZES, "tie_word_embeddings": True},
    "qwen3-tied": {"model_type": "qwen3", **SIZES, "tie_word_embeddings": True, "head_dim": 32},
}


def reference_model(name: str, dtype: str = "float32") -> PreTrainedModel:
    """transformers' model with weights large enough that attention and the next token depend on the context."""
    torch.manual_seed(list(MODELS).index(name))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[name]), attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.to(getattr(torch, dtype)).eval()


def make_engine(name: str, group: dist.ProcessGroup | None = None, **rollout: Any) -> Engine:
    """An engine with the weights of `reference_model(name)`, in rollout's dtype (default float32)."""
    settings = {"dtype": "float32", "num_kv_blocks": 400, **rollout}
    size = group.size() if group is not None else 1
    config = RolloutConfig(tensor_model_parallel_size=size, **settings)
    architecture = read_architecture(MODELS[name], name)
    engine = Engine(architecture, config, group, torch.device("cpu"), None, MAX_MODEL_LEN)
    load(engine, reference_model(name), group)
    engine.weights_updated(1)
    return engine


def load(engine: Engine, model: PreTrainedModel, group: dist.ProcessGroup | None = None) -> None:
    """Overwrite the engine's local tensors with a model's weights."""
    size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    weights = model.state_dict()
    for local in decode_placement(engine.architecture, size, rank):
        for piece in local.pieces:
            source = weights[piece.tensor][box_slices(piece.start, piece.shape)]
            engine.local_tensors()[local.name][box_slices(piece.local_start, piece.shape)].copy_(source)


def prompts(*lengths: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, SIZES["vocab_size"], (n,), generator=generator).tolist()) for n in lengths]


@torch.no_grad()
def reference_logprobs(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """log-softmax after every token: [tokens, vocab_size], float32."""
    return model(torch.tensor([token_ids])).logits[0].float().log_softmax(-1)
