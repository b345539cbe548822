"""The decode engine: continuous batching over one replica's shard of the policy.

Under tensor parallelism every rank of the replica runs this same loop: the scheduler decides from equal integers and the
sampler returns equal tokens, so the ranks stay in step without exchanging anything else.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from erollout.config import RolloutConfig
from erollout.engine.block_manager import BlockManager
from erollout.engine.build import build_decode_model
from erollout.engine.detokenizer import StopStringDetector
from erollout.engine.kv_cache import KVCache, num_blocks
from erollout.engine.linear import resolve_linear_kernel
from erollout.engine.model_runner import ModelRunner
from erollout.engine.proposer import DraftRequest, Drafts, Proposer
from erollout.engine.random import sequence_seed
from erollout.engine.sampler import Sampler, SamplerKernel
from erollout.engine.scheduler import Batch, Scheduler
from erollout.engine.sequence import Sequence
from erollout.engine.verifier import Candidate, Verification, VerifiedRun, Verifier, sampling_row
from erollout.errors import UserError
from erollout.policy.architecture import Architecture
from erollout.speculation.statistics import SpeculationStatistics
from erollout.types import Rollout, RolloutRequest


@dataclass(slots=True)
class GenerationStats:
    """Of one call to generate."""

    prefill_tokens: int = 0
    """Tokens computed at prompt positions: each prompt once per group, more after a preemption."""
    recomputed_tokens: int = 0
    """Tokens of responses that were computed again after a preemption."""
    decode_tokens: int = 0
    """Tokens sampled."""
    steps: int = 0
    """Forward passes."""
    preemptions: int = 0
    seconds: float = 0.0
    running: list[int] = field(default_factory=list)
    """Sequences in each forward pass."""
    speculation: SpeculationStatistics = field(default_factory=SpeculationStatistics)

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens over the whole call, prefill included."""
        return self.decode_tokens / self.seconds if self.seconds else 0.0

    @property
    def peak_running(self) -> int:
        return max(self.running, default=0)

    @property
    def mean_running(self) -> float:
        return sum(self.running) / len(self.running) if self.running else 0.0


class Engine:
    """One rank of a decode replica. `generate`, `sleep` and `wake_up` are collective over `group`."""

    def __init__(
        self,
        architecture: Architecture,
        rollout: RolloutConfig,
        group: dist.ProcessGroup | None,
        device: torch.device,
        tokenizer: PreTrainedTokenizerBase | None,
        max_model_len: int,
    ) -> None:
        dtype = getattr(torch, rollout.dtype)
        size = group.size() if group is not None else 1
        self.architecture = architecture
        self.rollout = rollout
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.cache = KVCache(architecture, size, num_blocks(rollout, architecture), rollout.block_size, dtype, device)
        self.kernel = resolve_linear_kernel(rollout.kernels, dtype, device)
        self.model = build_decode_model(self.kernel, architecture, group, self.cache, max_model_len, dtype, device)
        self.runner = ModelRunner(self.model)
        sampling: SamplerKernel = "native" if self.kernel == "native" else "torch"
        self.sampler = Sampler(architecture.vocab_size, self.model.vocab_start, group, sampling)
        self.verifier = Verifier(self.sampler)
        self.proposer: Proposer | None = None
        self.num_speculative_tokens = 0
        self.blocks = BlockManager(self.cache.num_blocks, rollout.block_size)
        self.policy_version: int | None = None
        self.stats = GenerationStats()
        self._prepared = False
        self._detectors: dict[int, StopStringDetector] = {}
        """Of the sequences with stop strings, by Sequence.order."""
        self.wake_up()

    def speculate(self, proposer: Proposer | None, num_speculative_tokens: int, verification: Verification = "coupled") -> None:
        """Let each decoding sequence verify up to so many drafts of `proposer` per pass from now on; 0 turns that off.

        Under tensor parallelism: the same on all ranks of the replica.
        """
        assert num_speculative_tokens == 0 or proposer is not None
        self.proposer = proposer
        self.num_speculative_tokens = num_speculative_tokens
        self.verifier = Verifier(self.sampler, verification)

    def local_tensors(self) -> dict[str, Tensor]:
        """This rank's weights by their names in decode_placement: to be overwritten in place, then `weights_updated`."""
        return self.model.tensors

    def weights_updated(self, policy_version: int) -> None:
        """Say that the local tensors now hold this version of the policy."""
        self.policy_version = policy_version
        self._release_kernels()

    def sleep(self) -> None:
        """Release the KV cache and the kernels' own copies of the weights; the local tensors stay."""
        self.cache.release()
        self._release_kernels()
        if self.proposer is not None:
            self.proposer.sleep()

    def wake_up(self) -> None:
        """Take the KV cache's memory again."""
        self.cache.allocate()

    def generate(self, requests: List[RolloutRequest], on_finished: Callable[[Rollout], None] | None = None) -> list[Rollout]:
        """Sample every request group_size times.

        Args:
            on_finished: called with each rollout as soon as it is complete, in the order of completion.

        Returns: rollouts ordered by request, then by sample.
        Raises UserError, before any work, for a request that can't be served; RuntimeError while asleep, without weights or
            with drafts of another policy version. After an error on the way the engine is as before the call.
        """
        self._require_ready()
        started = time.perf_counter()
        self.stats = GenerationStats()
        self.blocks = BlockManager(self.cache.num_blocks, self.rollout.block_size)
        limits = (self.rollout.max_num_seqs, self.rollout.max_num_batched_tokens, self.max_model_len)
        scheduler = Scheduler(self.blocks, *limits)
        sequences = self._queue(requests, scheduler)
        self._detectors = self._stop_detectors(sequences)
        try:
            while scheduler.has_unfinished:
                for sequence in self._step(scheduler):
                    if on_finished is not None:
                        on_finished(self._rollout(requests[sequence.request_index], sequence))
        except BaseException:
            scheduler.cancel()
            self.sleep()
            self.wake_up()  # with an empty cache: what a failed pass wrote may be NaN
            raise
        assert self.blocks.num_free == self.blocks.num_blocks, "KV blocks leaked"
        self.stats.preemptions = scheduler.num_preemptions
        self.stats.seconds = time.perf_counter() - started
        return [self._rollout(requests[sequence.request_index], sequence) for sequence in sequences]

    @torch.inference_mode()
    def _step(self, scheduler: Scheduler) -> list[Sequence]:
        """One forward pass and the tokens it yields; the sequences that it finished."""
        batch = scheduler.schedule(self.num_speculative_tokens)
        self._count(batch)
        self.cache.copy_blocks(batch.copies)
        columns = [(0, 0)] * len(batch.scheduled)
        if not any(item.num_drafts for item in batch.scheduled):
            return self._advance(scheduler, batch, columns, None)
        assert self.proposer is not None
        request, columns = _drafts_wanted(batch)
        started = time.perf_counter()
        drafts = self.proposer.propose(request)
        drafted = time.perf_counter()
        finished = self._advance(scheduler, batch, columns, drafts)
        self.stats.speculation.seconds_drafting += drafted - started
        self.stats.speculation.seconds_verifying += time.perf_counter() - drafted
        return finished

    def _advance(
        self, scheduler: Scheduler, batch: Batch, columns: list[tuple[int, int]], drafts: Drafts | None
    ) -> list[Sequence]:
        """The target's pass over a batch and its drafts: append what is verified; the sequences that it finished.

        Args:
            columns: of each scheduled sequence in the drafts, with their number.
        """
        logits = self.runner.run(batch, drafts.runs(columns) if drafts is not None else None)
        sampled, candidates, rows = _candidates(scheduler, batch, columns)
        if not sampled:
            return []
        if len(rows) != logits.shape[0]:
            logits = logits.index_select(0, torch.tensor(rows, device=logits.device))
        runs = self.verifier.verify(logits, candidates, drafts)
        finished = []
        for sequence, candidate, run in zip(sampled, candidates, runs, strict=True):
            ended = self._append(sequence, run, candidate.num_drafts)
            if candidate.num_drafts:
                scheduler.verified(sequence)
            if ended:
                scheduler.finish(sequence)
                finished.append(sequence)
        return finished

    def _append(self, sequence: Sequence, run: VerifiedRun, num_drafts: int) -> bool:
        """Append a run's tokens up to the one that ends the response; whether one did."""
        ended, before = False, len(sequence.response_ids)
        for token_id, logprob, raw_logprob in zip(run.token_ids, run.logprobs, run.raw_logprobs, strict=True):
            sequence.append(token_id, logprob, raw_logprob)
            if ended := self._finishes(sequence):
                break
        emitted = len(sequence.response_ids) - before
        self.stats.decode_tokens += emitted
        if num_drafts:
            self.stats.speculation.record(num_drafts, run.num_accepted, min(emitted, run.num_accepted))
        return ended

    def _finishes(self, sequence: Sequence) -> bool:
        """Set the finish reason of a sequence that its last token ends."""
        sampling = sequence.sampling
        stop_id = not sampling.ignore_eos and sequence.response_ids[-1] in sampling.stop_token_ids
        if stop_id or self._has_stop_string(sequence):
            sequence.finish_reason = "stop"
        elif len(sequence.response_ids) >= sampling.max_tokens:
            sequence.finish_reason = "length"
        return sequence.finish_reason is not None

    def _has_stop_string(self, sequence: Sequence) -> bool:
        """Show the last token to the sequence's detector, if it has one."""
        detector = self._detectors.get(sequence.order)
        return detector is not None and detector.feed(sequence.response_ids[-1])

    def _stop_detectors(self, sequences: list[Sequence]) -> dict[int, StopStringDetector]:
        return {s.order: StopStringDetector(self.tokenizer, s.sampling.stop) for s in sequences if s.sampling.stop}

    def _queue(self, requests: List[RolloutRequest], scheduler: Scheduler) -> list[Sequence]:
        """The sequences of all requests, in the order of the result."""
        for request in requests:
            self._check(request, scheduler)
        sequences: list[Sequence] = []
        for index, request in enumerate(requests):
            first = len(sequences)
            for sample in range(request.group_size):
                seed = sequence_seed(request.seed, sample)
                sequences.append(Sequence(first + sample, index, sample, tuple(request.prompt_ids), request.sampling, seed))
            scheduler.add(sequences[first:])
        return sequences

    def _check(self, request: RolloutRequest, scheduler: Scheduler) -> None:
        """Raise UserError for a request that can't be served."""
        scheduler.check(len(request.prompt_ids), request.sampling.max_tokens)
        if not all(0 <= token < self.architecture.vocab_size for token in request.prompt_ids):
            raise UserError(
                f"prompt {request.prompt_index} has token ids beyond the model's vocabulary of {self.architecture.vocab_size}; "
                "use the model's own tokenizer (model.tokenizer)"
            )
        if request.sampling.stop and self.tokenizer is None:
            raise UserError(f"rollout.stop = {list(request.sampling.stop)} needs a tokenizer; set model.tokenizer")

    def _require_ready(self) -> None:
        if not self.cache.is_allocated:
            raise RuntimeError("generate while the engine sleeps; call wake_up() first")
        if self.policy_version is None:
            raise RuntimeError("generate before the engine has weights; write local_tensors() and call weights_updated() first")
        if not self._prepared:
            self.model.prepare()
            self._prepared = True
        if self.num_speculative_tokens and self.proposer is not None:
            self.proposer.require(self.policy_version)

    def _release_kernels(self) -> None:
        self.model.release()
        self._prepared = False

    def _count(self, batch: Batch) -> None:
        stats = self.stats
        stats.steps += 1
        stats.running.append(len(batch.scheduled))
        for item in batch.scheduled:
            prompt = max(0, min(item.end, len(item.sequence.prompt_ids)) - item.start)
            stats.prefill_tokens += prompt
            stats.recomputed_tokens += item.num_tokens - prompt - item.catches_up * (prompt < item.num_tokens)

    def _rollout(self, request: RolloutRequest, sequence: Sequence) -> Rollout:
        assert sequence.finish_reason is not None and self.policy_version is not None
        return Rollout(
            prompt_index=request.prompt_index,
            sample_index=sequence.sample_index,
            prompt_ids=sequence.prompt_ids,
            response_ids=tuple(sequence.response_ids),
            rollout_logprobs=tuple(sequence.logprobs),
            raw_logprobs=tuple(sequence.raw_logprobs),
            finish_reason=sequence.finish_reason,
            policy_version=self.policy_version,
        )


def _drafts_wanted(batch: Batch) -> tuple[DraftRequest, list[tuple[int, int]]]:
    """The request for a batch's drafts and, for each scheduled sequence, its column in the answer and its number of drafts."""
    drafting = sorted((item for item in batch.scheduled if item.num_drafts), key=lambda item: -item.num_drafts)
    column = {item.sequence.order: index for index, item in enumerate(drafting)}
    request = DraftRequest([item.sequence for item in drafting], [item.num_drafts for item in drafting])
    return request, [(column.get(item.sequence.order, 0), item.num_drafts) for item in batch.scheduled]


def _candidates(
    scheduler: Scheduler, batch: Batch, columns: list[tuple[int, int]]
) -> tuple[list[Sequence], list[Candidate], list[int]]:
    """The sequences of a computed batch that get tokens, what decides about them, and the rows of the logits that they need."""
    sequences: list[Sequence] = []
    candidates: list[Candidate] = []
    rows: list[int] = []
    start = 0
    for item, (column, num_drafts) in zip(batch.scheduled, columns, strict=True):
        if ready := scheduler.computed(item):
            sequences += ready
            candidates += [Candidate(sampling_row(sequence), num_drafts, column) for sequence in ready]
            rows += len(ready) * list(range(start, start + 1 + num_drafts))  # siblings draw from their leader's logits
            start += 1 + num_drafts
    return sequences, candidates, rows
