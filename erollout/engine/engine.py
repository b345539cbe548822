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
from erollout.engine.decode_model import DecodeModel
from erollout.engine.detokenizer import StopStringDetector
from erollout.engine.kv_cache import KVCache, num_blocks
from erollout.engine.linear import resolve_linear_kernel
from erollout.engine.model_runner import ModelRunner
from erollout.engine.random import sequence_seed
from erollout.engine.sampler import Sampler, SamplingRow
from erollout.engine.scheduler import Batch, Scheduler
from erollout.engine.sequence import Sequence
from erollout.errors import UserError
from erollout.policy.architecture import Architecture
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
        self.model = DecodeModel(architecture, group, self.kernel, self.cache, max_model_len, dtype, device)
        self.runner = ModelRunner(self.model)
        self.sampler = Sampler(architecture.vocab_size, self.model.vocab_start, group)
        self.blocks = BlockManager(self.cache.num_blocks, rollout.block_size)
        self.policy_version: int | None = None
        self.stats = GenerationStats()
        self._prepared = False
        self._detectors: dict[int, StopStringDetector] = {}
        """Of the sequences with stop strings, by Sequence.order."""
        self.wake_up()

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

    def wake_up(self) -> None:
        """Take the KV cache's memory again."""
        self.cache.allocate()

    def generate(self, requests: List[RolloutRequest], on_finished: Callable[[Rollout], None] | None = None) -> list[Rollout]:
        """Sample every request group_size times.

        Args:
            on_finished: called with each rollout as soon as it is complete, in the order of completion.

        Returns: rollouts ordered by request, then by sample.
        Raises UserError, before any work, for a request that can't be served; RuntimeError while asleep or without weights.
        """
        self._require_ready()
        started = time.perf_counter()
        self.stats = GenerationStats()
        self.blocks = BlockManager(self.cache.num_blocks, self.rollout.block_size)
        limits = (self.rollout.max_num_seqs, self.rollout.max_num_batched_tokens, self.max_model_len)
        scheduler = Scheduler(self.blocks, *limits)
        sequences = self._queue(requests, scheduler)
        self._detectors = self._stop_detectors(sequences)
        while scheduler.has_unfinished:
            for sequence in self._step(scheduler):
                if on_finished is not None:
                    on_finished(self._rollout(requests[sequence.request_index], sequence))
        assert self.blocks.num_free == self.blocks.num_blocks, "KV blocks leaked"
        self.stats.preemptions = scheduler.num_preemptions
        self.stats.seconds = time.perf_counter() - started
        return [self._rollout(requests[sequence.request_index], sequence) for sequence in sequences]

    @torch.inference_mode()
    def _step(self, scheduler: Scheduler) -> list[Sequence]:
        """One forward pass and the tokens it yields; the sequences that it finished."""
        batch = scheduler.schedule()
        self._count(batch)
        logits = self.runner.run(batch)
        sampled: list[Sequence] = []
        rows: list[int] = []
        for item in batch.scheduled:
            if ready := scheduler.computed(item):
                row = rows[-1] + 1 if rows else 0
                rows += [row] * len(ready)  # siblings draw their first token from their leader's logits
                sampled += ready
        if not sampled:
            return []
        self._sample(logits, rows, sampled)
        finished = [sequence for sequence in sampled if self._finishes(sequence)]
        for sequence in finished:
            scheduler.finish(sequence)
        return finished

    def _sample(self, logits: Tensor, rows: list[int], sequences: list[Sequence]) -> None:
        """Append one token to each sequence, drawn from the row of the logits beside it."""
        if len(rows) != logits.shape[0]:
            logits = logits.index_select(0, torch.tensor(rows, device=logits.device))
        drawn = self.sampler.sample(logits, [_sampling_row(sequence) for sequence in sequences])
        for values in zip(sequences, drawn.token_ids, drawn.logprobs, drawn.raw_logprobs, strict=True):
            sequence, token_id, logprob, raw_logprob = values
            sequence.append(token_id, logprob, raw_logprob)
        self.stats.decode_tokens += len(sequences)

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


def _sampling_row(sequence: Sequence) -> SamplingRow:
    position = sequence.num_tokens
    needs_context = sequence.sampling.repetition_penalty != 1.0
    context = sequence.tokens(0, position) if needs_context else None
    return SamplingRow(params=sequence.sampling, seed=sequence.seed, position=position, context_ids=context)
