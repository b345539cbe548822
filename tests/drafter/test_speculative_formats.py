"""Greedy decoding with every format of the drafter: token for token what it is without drafts."""

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from tiny_decode import SIZES, prompts

from erollout.config import RolloutConfig
from erollout.drafter.drafter import Drafter
from erollout.drafter.formats import FORMATS
from erollout.engine.engine import Engine
from erollout.engine.proposers.quantized_policy import ModelProposer
from erollout.policy.families import read_architecture
from erollout.speculation.step import Arm
from erollout.types import RolloutRequest, SamplingParams

MODEL = {"model_type": "llama", **SIZES, "intermediate_size": 192, "tie_word_embeddings": False}
"""On one rank and on two, every layer divides into groups of 32."""


def make_engine(group: dist.ProcessGroup | None) -> Engine:
    """Random weights, large enough that the next token depends on the context."""
    size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    rollout = RolloutConfig(tensor_model_parallel_size=size, num_kv_blocks=2000, max_num_seqs=500, dtype="bfloat16")
    engine = Engine(read_architecture(MODEL, "tiny"), rollout, group, torch.device("cpu"), None, 128)
    for index, (name, tensor) in enumerate(engine.local_tensors().items()):
        seed = index if "norm" in name else 1000 * rank + index  # norms are whole on every rank
        tensor.copy_(
            torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)) * (0.15 if tensor.dim() == 2 else 1)
        )
    engine.weights_updated(1)
    return engine


def differing_responses(
    formats: Sequence[str], lengths: Sequence[int], num_prompts: int
) -> dict[tuple[str, int], tuple[int, float]]:
    """For each format and draft length: responses that differ from those without drafts, and the acceptance rate."""
    engine = make_engine(dist.group.WORLD if dist.get_world_size() > 1 else None)
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    requests = [
        RolloutRequest(i, ids, 1, greedy, seed=0) for i, ids in enumerate(prompts(*(1 + i % 37 for i in range(num_prompts))))
    ]
    plain = [rollout.response_ids for rollout in engine.generate(requests)]
    results = {}
    for format in formats:
        drafter = Drafter(
            engine.model,
            lambda model: ModelProposer(model, "coupled", engine.sampler.kernel),
            128,
            format=format,
            group_size=32,
        )
        for name in engine.local_tensors():
            drafter.requantize_(name)
        drafter.complete(1)
        for n in lengths:
            engine.speculate({"": drafter}, Arm("", n))
            drafted = [rollout.response_ids for rollout in engine.generate(requests)]
            differing = sum(a != b for a, b in zip(plain, drafted, strict=True))
            results[format, n] = (differing, engine.stats.speculation.acceptance_rate)
    return results


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "lengths", "num_prompts"),
    [(2, (3,), 74), *(pytest.param(world_size, (1, 3, 7), 1000, marks=pytest.mark.full) for world_size in (1, 2))],
)
def test_greedy_tokens_do_not_depend_on_the_drafter(
    world_size: int, lengths: tuple[int, ...], num_prompts: int, rank_pool: RankPool
) -> None:
    for results in rank_pool.run(world_size, differing_responses, tuple(FORMATS), lengths, num_prompts, timeout=240):
        assert set(results) == {(format, n) for format in FORMATS for n in lengths}
        for case, (differing, acceptance_rate) in results.items():
            assert differing == 0, case
            assert 0.1 < acceptance_rate < 1.0, (case, acceptance_rate)
