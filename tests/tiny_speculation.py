"""Proposers for tests: decode models with perturbed copies of the target's weights, and one that only looks at the text."""

from typing import Any

import torch
import torch.distributed as dist
from tiny_decode import MAX_MODEL_LEN, make_engine

from erollout.engine.engine import Engine
from erollout.engine.model.decode_model import DecodeModel
from erollout.engine.model.factory import model_class
from erollout.engine.proposers.base import DraftRequest, Drafts
from erollout.engine.proposers.quantized_policy import ModelProposer
from erollout.engine.sampling.verifier import Verification
from erollout.speculation.step import Arm

DRAFTER = "perturbed"
"""Name of the one proposer that an engine of these has."""

NOISE = {"same": 0.0, "good": 0.02, "bad": 1.0}
"""Standard deviation of what is added to the target's weights, whose own is about 0.1."""


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
        engine.speculate({DRAFTER: NGramProposer(engine)}, Arm(DRAFTER, num_speculative_tokens), verification)
        return engine
    proposer = ModelProposer(perturbed_model(engine, NOISE[drafter], group), verification, engine.sampler.kernel)
    proposer.weights_updated(1)
    engine.speculate({DRAFTER: proposer}, Arm(DRAFTER, num_speculative_tokens), verification)
    return engine


class NGramProposer:
    """What followed the last token's latest earlier occurrence; certain of it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def require(self, policy_version: int) -> None:
        pass

    def propose(self, request: DraftRequest) -> Drafts:
        columns = [self._continuation(s.tokens(0, s.num_tokens), request.num_drafts[0]) for s in request.sequences]
        return Drafts(torch.tensor(columns).T.contiguous(), None)

    def sleep(self) -> None:
        pass

    def _continuation(self, ids: list[int], length: int) -> list[int]:
        for i in range(len(ids) - 2, -1, -1):
            if ids[i] == ids[-1]:
                following = ids[i + 1 : i + 1 + length]
                return following + [ids[-1]] * (length - len(following))
        return [ids[-1]] * length
