"""Proposers for tests: decode models with perturbed copies of the target's weights, and n-grams as short as a token."""

from typing import Any

import torch
import torch.distributed as dist
from tiny_decode import MAX_MODEL_LEN, make_engine

from erollout.configuration.speculation import NGramConfig
from erollout.engine.engine import Engine
from erollout.engine.model.decode_model import DecodeModel
from erollout.engine.model.factory import model_class
from erollout.engine.proposers.ngram import NGramProposer
from erollout.engine.proposers.quantized_policy import ModelProposer
from erollout.engine.sampling.verifier import Verification
from erollout.speculation.step import Arm

DRAFTER = "perturbed"
"""Name of the one proposer that an engine of these has."""

NOISE = {"same": 0.0, "good": 0.02, "bad": 1.0}
"""Standard deviation of what is added to the target's weights, whose own is about 0.1."""

SHORT_NGRAMS = NGramConfig(max_ngram=3, min_ngram=1)  # type: ignore[call-arg]  # mypy does not see through section


def perturbed_model(engine: Engine, noise: float, group: dist.ProcessGroup | None = None) -> DecodeModel:
    """A second model on the engine's cache."""
    model = model_class(engine.kernel)(engine.architecture, group, engine.kernel, engine.cache, MAX_MODEL_LEN)
    generator = torch.Generator().manual_seed(group.rank() if group is not None else 0)
    for name, tensor in model.tensors.items():
        tensor.copy_(engine.local_tensors()[name])
        tensor.add_(torch.randn(tensor.shape, generator=generator) * noise)
    return model


def make_speculative_engine(
    drafter: str,
    verification: Verification,
    num_speculative_tokens: int,
    group: dist.ProcessGroup | None = None,
    name: str = "llama",
    **rollout: Any,
) -> Engine:
    """`make_engine` with a drafter of NOISE, or `ngram`."""
    engine = make_engine(name, group, **rollout)
    if drafter == "ngram":
        proposers = {DRAFTER: NGramProposer(SHORT_NGRAMS, engine.cache.device)}
        engine.speculate(proposers, Arm(DRAFTER, num_speculative_tokens), verification)
        return engine
    proposer = ModelProposer(perturbed_model(engine, NOISE[drafter], group), verification, engine.sampler.kernel)
    proposer.weights_updated(1)
    engine.speculate({DRAFTER: proposer}, Arm(DRAFTER, num_speculative_tokens), verification)
    return engine
