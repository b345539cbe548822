"""The decode engine: continuous batching over one replica's shard of the policy.

Under tensor parallelism every rank of the replica runs the same loop: the scheduler decides from equal integers and the sampler
returns equal tokens, so the ranks stay in step without exchanging anything else.
"""

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from erollout.config import RolloutConfig
from erollout.data.response_text import ResponseText
from erollout.engine.block_manager import BlockManager
from erollout.engine.generation_stats import GenerationStats
from erollout.engine.kv_cache import KVCache, num_blocks
from erollout.engine.model.factory import model_class
from erollout.engine.model.linear import resolve_linear_kernel
from erollout.engine.model.model_runner import ModelRunner
from erollout.engine.orders import Arrival, Control, FixedControl, Orders
from erollout.engine.proposers.base import DraftRequest, Drafts, Proposer
from erollout.engine.sampling.detokenizer import StopStringDetector
from erollout.engine.sampling.random import sequence_seed
from erollout.engine.sampling.sampler import Sampler, SamplerKernel
from erollout.engine.sampling.verifier import Candidate, Verification, VerifiedRun, Verifier, sampling_row
from erollout.engine.scheduler import Batch, Scheduler
from erollout.engine.self_test import promise_of
from erollout.engine.sequence import Sequence
from erollout.errors import UserError
from erollout.policy.architecture import Architecture
from erollout.speculation.statistics import SpeculationStatistics
from erollout.speculation.step import OFF, Arm, Load, StepOutcome
from erollout.tracking.profiler import span
from erollout.types import FinishReason, PartialRollout, Rollout, RolloutRequest


@dataclass(slots=True)
class _Generation:
    """State of one call to generate or run."""

    scheduler: Scheduler
    requests: list[RolloutRequest] = field(default_factory=list)
    num_sequences: int = 0
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    """Complete rollouts by Sequence.order."""
    detectors: dict[int, StopStringDetector] = field(default_factory=dict)
    """Detectors of the sequences with stop strings, by Sequence.order."""


class Engine:
    """One rank of a decode replica. `generate`, `run`, `sleep` and `wake_up` are collective over `group`."""

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
        self.model = model_class(self.kernel)(architecture, group, self.kernel, self.cache, max_model_len)
        self.promise = promise_of(self.kernel, self.model)
        """What the bits of a token depend on."""
        self.runner = ModelRunner(self.model)
        sampling: SamplerKernel = "native" if self.kernel == "native" else "torch"
        self.sampler = Sampler(architecture.vocab_size, self.model.vocab_start, group, sampling)
        self.verifier = Verifier(self.sampler)
        self.proposers: dict[str, Proposer] = {}
        """Proposers by Arm.format."""
        self.arm = OFF
        """Arm of `generate`."""
        self.blocks = BlockManager(self.cache.num_blocks, rollout.block_size)
        self.policy_version: int | None = None
        self.stats = GenerationStats()
        self.left: list[PartialRollout] = []
        """Partial rollouts of the last call to run, if it was interrupted."""
        self._prepared = False
        self.wake_up()

    @cached_property
    def response_text(self) -> ResponseText:
        """Decoder of responses for scorers and stop strings."""
        assert self.tokenizer is not None
        ends, stops = self.architecture.eos_token_ids, self.rollout.stop_token_ids
        return ResponseText(self.tokenizer, self.rollout.special_tokens, ends, stops)

    def speculate(self, proposers: Mapping[str, Proposer], arm: Arm = OFF, verification: Verification = "coupled") -> None:
        """Use these proposers for the arms that name them.

        Args:
            proposers: proposers by Arm.format; the same on all ranks of the replica.
            arm: arm of every step of `generate`; `run` asks its control.

        Raises UserError for coupled verification on kernels that fail the self-test.
        """
        if proposers and verification == "coupled":
            self.promise.require_coupled()
        self.proposers = dict(proposers)
        self.arm = arm
        self.verifier = Verifier(self.sampler, verification)

    def _begin_anew(self, scheduler: Scheduler) -> None:
        """Start over with an empty cache, because a failed pass may have written NaN."""
        scheduler.cancel()
        self.sleep()
        self.wake_up()

    def local_tensors(self) -> dict[str, Tensor]:
        """This rank's weights by their names in decode_placement, to be overwritten in place before `weights_updated`."""
        return self.model.tensors

    def weights_updated(self, policy_version: int) -> None:
        """Declare that the local tensors now hold this version of the policy."""
        self.policy_version = policy_version
        self._release_kernels()

    def sleep(self) -> None:
        """Release the KV cache and the kernels' own copies of the weights, but not the local tensors."""
        self.cache.release()
        self._release_kernels()
        for proposer in self.proposers.values():
            proposer.sleep()

    def wake_up(self) -> None:
        """Allocate the KV cache again."""
        self.cache.allocate()

    def generate(self, requests: List[RolloutRequest], on_finished: Callable[[Rollout], None] | None = None) -> list[Rollout]:
        """Sample every request group_size times, as `run`, with the same arm at every step.

        Returns: rollouts ordered by request, then by sample.
        """
        return self.run(FixedControl(self.arm), on_finished, requests)

    def run(
        self,
        control: Control,
        on_finished: Callable[[Rollout], None] | None = None,
        requests: List[RolloutRequest] = (),
    ) -> list[Rollout]:
        """Sample the given requests and those that the control orders, until its last orders are carried out or it interrupts.

        Args:
            on_finished: called with each rollout as soon as it is complete, in the order of completion.

        Returns: rollouts completed here, in the order of their requests, then by sample.
        Raises UserError for an impossible request, before any work on it; RuntimeError while asleep, without weights or with
            drafts of another policy version. After an error the engine is as before the call.
        """
        self._require_ready()
        started = time.perf_counter()
        self.stats = GenerationStats()
        self.left = []
        self.blocks = BlockManager(self.cache.num_blocks, self.rollout.block_size)
        limits = (self.rollout.max_num_seqs, self.rollout.max_num_batched_tokens, self.max_model_len)
        generation = _Generation(Scheduler(self.blocks, *limits))
        scheduler = generation.scheduler
        for request in requests:
            self._check(request, scheduler)
        with ExitStack() as failed:
            failed.callback(self._begin_anew, scheduler)
            self._take(generation, Orders(requests=tuple(requests)))
            while not self._ended(generation, orders := control.orders(scheduler.load())):
                self._take(generation, orders)
                if orders.interrupts:
                    self.left = self._release(generation, generation.num_sequences)
                    scheduler.cancel()  # groups that wait for their prompt, without a token yet
                    break
                if orders.release:
                    control.released(self._release(generation, orders.release))
                if scheduler.has_unfinished:
                    control.observe(self._step(generation, orders.arm, on_finished))
            failed.pop_all()
        assert self.blocks.num_free == self.blocks.num_blocks, "KV blocks leaked"
        self.stats.preemptions = scheduler.num_preemptions
        self.stats.seconds = time.perf_counter() - started
        return [rollout for _, rollout in sorted(generation.rollouts.items())]

    @torch.inference_mode()
    def _step(self, generation: _Generation, arm: Arm, on_finished: Callable[[Rollout], None] | None) -> StepOutcome:
        """Run one forward pass with its drafts, append the tokens, and report the outcome."""
        started = time.perf_counter()
        with span("engine/schedule"):
            batch = generation.scheduler.schedule(arm.num_speculative_tokens)
        self._count(batch)
        load = _load(batch, generation.scheduler)
        self.cache.copy_blocks(batch.copies)
        step = SpeculationStatistics(requested=sum(item.num_drafts for item in batch.scheduled))
        columns, drafts, timed = [(0, 0)] * len(batch.scheduled), None, False
        if step.requested:
            began = time.perf_counter()
            with span("engine/draft"):
                found, columns = self._draft(arm, batch, generation.scheduler)
            step.seconds_drafting = time.perf_counter() - began
            drafts = found if any(number for _, number in columns) else None
            timed = found.on_host or self.cache.device.type == "cpu"
        before = self.stats.decode_tokens
        verifying = time.perf_counter()
        finished = self._advance(generation, batch, columns, drafts, step)
        if drafts is not None:
            step.seconds_verifying = time.perf_counter() - verifying
        if step.requested:
            self.stats.speculation.add(step)
        seconds = time.perf_counter() - started  # the caller's work on rollouts is not part of the step
        for sequence in finished:
            rollout = generation.rollouts[sequence.order] = self._rollout(generation.requests[sequence.request_index], sequence)
            if on_finished is not None:
                on_finished(rollout)
        return StepOutcome(
            arm if step.requested else OFF,
            load,
            seconds,
            step.seconds_drafting if timed else 0.0,
            self.stats.decode_tokens - before,
            tuple(step.drafted_at),
            tuple(step.accepted_at),
            len(finished),
            step.requested,
        )

    def _draft(self, arm: Arm, batch: Batch, scheduler: Scheduler) -> tuple[Drafts, list[tuple[int, int]]]:
        """Draft for a batch, which keeps as many drafts as the proposer had. Returns them and, for each scheduled sequence, its
        column with their number."""
        request, columns = _drafts_wanted(batch)
        drafts = self._proposer(arm).propose(request)
        if drafts.num_drafts is None:
            return drafts, columns
        columns = [(column, min(requested, drafts.num_drafts[column])) for column, requested in columns]
        scheduler.keep_drafts(batch, (number for _, number in columns))
        return drafts, columns

    def _advance(
        self,
        generation: _Generation,
        batch: Batch,
        columns: list[tuple[int, int]],
        drafts: Drafts | None,
        statistics: SpeculationStatistics,
    ) -> list[Sequence]:
        """Run the target's pass over a batch and its drafts, and append the verified tokens. Returns the finished sequences.

        Args:
            columns: column of each scheduled sequence in the drafts, with their number.
            statistics: the outcomes of the drafts are added to it.
        """
        scheduler = generation.scheduler
        with span("engine/verify"):
            logits = self.runner.run(batch, drafts.runs(columns) if drafts is not None else None)
        sampled, candidates, rows = _candidates(scheduler, batch, columns)
        if not sampled:
            return []
        if len(rows) != logits.shape[0]:
            logits = logits.index_select(0, torch.tensor(rows, device=logits.device))
        with span("engine/sample"):
            runs = self.verifier.verify(logits, candidates, drafts)
        finished = []
        for sequence, candidate, run in zip(sampled, candidates, runs, strict=True):
            emitted = self._append(generation, sequence, run)
            if candidate.num_drafts:
                statistics.record(candidate.num_drafts, run.num_accepted, min(emitted, run.num_accepted))
                scheduler.verified(sequence)
            if sequence.finish_reason is not None:
                scheduler.finish(sequence)
                finished.append(sequence)
        return finished

    def _append(self, generation: _Generation, sequence: Sequence, run: VerifiedRun) -> int:
        """Append a run's tokens up to the one that ends the response. Returns their number."""
        before = len(sequence.response_ids)
        for token_id, logprob, raw_logprob in zip(run.token_ids, run.logprobs, run.raw_logprobs, strict=True):
            sequence.append(token_id, logprob, raw_logprob)
            sequence.finish_reason = self._finish_reason(generation, sequence)
            if sequence.finish_reason is not None:
                break
        emitted = len(sequence.response_ids) - before
        self.stats.decode_tokens += emitted
        return emitted

    def _finish_reason(self, generation: _Generation, sequence: Sequence) -> FinishReason | None:
        """Reason why a sequence ends with its last token; None: it continues."""
        sampling = sequence.sampling
        detector = generation.detectors.get(sequence.order)
        stop_id = not sampling.ignore_eos and sequence.response_ids[-1] in sampling.stop_token_ids
        if stop_id or (detector is not None and detector.feed(sequence.response_ids[-1])):
            return "stop"
        return "length" if len(sequence.response_ids) >= sampling.max_tokens else None

    def _ended(self, generation: _Generation, orders: Orders) -> bool:
        """Whether nothing is left to do, now or by these orders."""
        idle = not (generation.scheduler.has_unfinished or orders.requests or orders.arrivals)
        return orders.is_last and idle

    def _take(self, generation: _Generation, orders: Orders) -> None:
        """Queue the sequences of new requests, in the order of the result, and those to be resumed."""
        for request in orders.requests:
            self._check(request, generation.scheduler)
            begun = {partial.sample_index for partial in request.begun}
            fresh = [sample for sample in range(request.group_size) if sample not in request.finished | begun]
            group = [self._sequence(generation, request, sample) for sample in fresh]
            generation.requests.append(request)
            if group:
                generation.scheduler.add(group)
        resumed = [Arrival(request, partial) for request in orders.requests for partial in request.begun]
        for arrival in [*resumed, *orders.arrivals]:
            generation.scheduler.add([self._arrived(generation, arrival)])
            generation.requests.append(arrival.request)

    def _sequence(self, generation: _Generation, request: RolloutRequest, sample: int) -> Sequence:
        """A sequence for sample `sample` of the generation's latest request."""
        order, index = generation.num_sequences, len(generation.requests)
        generation.num_sequences += 1
        seed = sequence_seed(request.seed, sample)
        sequence = Sequence(order, index, sample, tuple(request.prompt_ids), request.sampling, seed)
        if request.sampling.stop:
            generation.detectors[order] = StopStringDetector(self.response_text, request.sampling.stop)
        return sequence

    def _arrived(self, generation: _Generation, arrival: Arrival) -> Sequence:
        """A sequence to be resumed from another replica or an earlier attempt, with nothing computed."""
        partial = arrival.partial
        sequence = self._sequence(generation, arrival.request, partial.sample_index)
        sequence.restore(partial)
        if (detector := generation.detectors.get(sequence.order)) is not None:
            for token_id in partial.response_ids:
                detector.feed(token_id)
        return sequence

    def _release(self, generation: _Generation, count: int) -> list[PartialRollout]:
        """Release up to `count` sequences, for another replica or a later attempt to resume."""
        released = generation.scheduler.release(count)
        return [sequence.partial(generation.requests[sequence.request_index].prompt_index) for sequence in released]

    def _proposer(self, arm: Arm) -> Proposer:
        """The proposer of an arm. Raises RuntimeError if its drafts are of another policy version."""
        assert arm.format in self.proposers, f"no drafter {arm.format!r}; there are {list(self.proposers)}"
        assert self.policy_version is not None
        proposer = self.proposers[arm.format]
        proposer.require(self.policy_version)
        return proposer

    def _check(self, request: RolloutRequest, scheduler: Scheduler) -> None:
        """Raise UserError for an impossible request."""
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
            loss_mask=tuple(sequence.loss_mask),
        )


def _load(batch: Batch, scheduler: Scheduler) -> Load:
    """The load of a pass."""
    decoding = [item.start for item in batch.scheduled if item.num_tokens == 1 and item.catches_up]
    prefill = sum(item.num_tokens for item in batch.scheduled) - len(decoding)
    return Load(len(decoding), sum(decoding) / len(decoding) if decoding else 0.0, prefill, len(scheduler.waiting))


def _drafts_wanted(batch: Batch) -> tuple[DraftRequest, list[tuple[int, int]]]:
    """The request for a batch's drafts and, for each scheduled sequence, its column in the answer and its number of drafts."""
    drafting = sorted((item for item in batch.scheduled if item.num_drafts), key=lambda item: -item.num_drafts)
    column = {item.sequence.order: index for index, item in enumerate(drafting)}
    request = DraftRequest([item.sequence for item in drafting], [item.num_drafts for item in drafting])
    return request, [(column.get(item.sequence.order, 0), item.num_drafts) for item in batch.scheduled]


def _candidates(
    scheduler: Scheduler, batch: Batch, columns: list[tuple[int, int]]
) -> tuple[list[Sequence], list[Candidate], list[int]]:
    """Candidates of a computed batch, with their sequences and the rows of the logits that they need."""
    sequences: list[Sequence] = []
    candidates: list[Candidate] = []
    rows: list[int] = []
    start = 0
    for item, (column, num_drafts) in zip(batch.scheduled, columns, strict=True):
        if ready := scheduler.computed(item):
            sequences += ready
            candidates += [Candidate(sampling_row(sequence), num_drafts, column) for sequence in ready]
            rows += len(ready) * list(range(start, start + 1 + num_drafts))  # siblings sample from their leader's logits
            start += 1 + num_drafts
    return sequences, candidates, rows
