"""Drafting with a second decode model on the target's own KV cache: one forward pass per draft position.

The model reads the target's keys and values of all tokens before the drafts and adds its own in the slots reserved for them,
which the target's verification overwrites. Everything that depends on integers is prepared before the first pass; then each
pass's tokens feed the next one on the device, without waiting for it.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from erollout.engine.model.attention import QuerySpan
from erollout.engine.model.decode_model import DecodeModel
from erollout.engine.model.inputs import ForwardInputs
from erollout.engine.model.model_runner import ModelRunner
from erollout.engine.proposers.base import DraftRequest, Drafts
from erollout.engine.sampling.logits import ShardLogits
from erollout.engine.sampling.random import draft_seed
from erollout.engine.sampling.sampler import Sampler, SamplerKernel, SamplingRow
from erollout.engine.sampling.verifier import Verification, sampling_row
from erollout.engine.sequence import Sequence


class ModelProposer:
    """Proposer with a decode model that shares the target's cache. Its weights belong to `policy_version`."""

    def __init__(self, model: DecodeModel, verification: Verification, sampler_kernel: SamplerKernel = "torch") -> None:
        """With `coupled` it samples with the target's noise, with `rejection` with its own, and keeps its distributions."""
        self.model = model
        self.runner = ModelRunner(model)
        self.cache = model.cache
        self.verification = verification
        self.sampler_kernel = sampler_kernel
        self.policy_version: int | None = None
        self._sampler = self._make_sampler()
        self._prepared = False

    def weights_updated(self, policy_version: int) -> None:
        """Declare that the model's weights now belong to this version of the policy."""
        self.policy_version = policy_version
        self._release()

    def require(self, policy_version: int) -> None:
        if self.policy_version != policy_version:
            raise RuntimeError(
                f"the drafter belongs to policy version {self.policy_version} but the engine holds version {policy_version}; "
                "update the drafter's weights too before generate()"
            )

    def sleep(self) -> None:
        self._sampler = self._make_sampler()  # frees the old sampler's buffers
        self._release()

    @torch.inference_mode()
    def propose(self, request: DraftRequest) -> Drafts:
        self._prepare()
        passes = [self._plan(request, step) for step in range(request.num_drafts[0])]
        rows = self._sampler.prepare([self._sampling_row(s) for s in request.sequences], self.cache.device)
        token = passes[0].token_ids
        token_ids: list[Tensor] = []
        processed: list[ShardLogits] = []
        for inputs in passes:
            num_sequences = len(inputs.token_ids)
            logits = self.model.forward(inputs.with_tokens(token[:num_sequences]))
            rows = rows.first(num_sequences)
            if self.verification == "coupled":
                token = self._sampler.draw_ids_on_device(logits, rows)
            else:
                token, drawn_from = self._sampler.draw_on_device(logits, rows)
                processed.append(drawn_from)
            rows = rows.advance(token)
            token_ids.append(F.pad(token, (0, len(request.sequences) - num_sequences)))
        return Drafts(torch.stack(token_ids), tuple(processed) or None)

    def _plan(self, request: DraftRequest, step: int) -> ForwardInputs:
        """The pass that computes the token before draft `step`, for the leading sequences with at least that many drafts.

        Its tokens are each sequence's last known one, read by the first pass and replaced by drafts in the others."""
        sequences = [s for s, wanted in zip(request.sequences, request.num_drafts, strict=True) if wanted > step]
        spans = [QuerySpan(s.num_computed_tokens + step, s.num_computed_tokens + step + 1, s.block_table) for s in sequences]
        return self.runner.inputs(spans, [s.tokens(s.num_computed_tokens, s.num_tokens)[0] for s in sequences])

    def _sampling_row(self, sequence: Sequence) -> SamplingRow:
        """Sampling row of a sequence's first draft: the target's, except for the noise under `rejection`."""
        row = sampling_row(sequence)
        return row if self.verification == "coupled" else replace(row, seed=draft_seed(row.seed))

    def _make_sampler(self) -> Sampler:
        return Sampler(self.model.architecture.vocab_size, self.model.vocab_start, self.model.group, self.sampler_kernel)

    def _prepare(self) -> None:
        if not self._prepared:
            self.model.prepare()
            self._prepared = True

    def _release(self) -> None:
        self.model.release()
        self._prepared = False
