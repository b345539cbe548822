"""Sampling of the next token: Gumbel-max over processed logits, with noise keyed by (sequence seed, position, token id).

The token is argmax(logit + noise), with the lowest id for ties. Since the noise is a pure function of the key, a row's token
does not depend on the other rows, on the batch or on the vocabulary's sharding, given equal logits. Only blocks of tokens whose
largest logit plus largest noise reaches a value already found are examined, which gives the same token as noise for all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from erollout.engine.sampling.logits import RowFilter, RowSettings, ShardLogits, gather, process, shard_grid, shard_logits
from erollout.engine.sampling.random import COLUMNS, LANES, TILE, block_exponentials, stream_keys, token_exponentials
from erollout.kernels.native_sampling import NativeSampling
from erollout.types import SamplingParams

SamplerKernel = Literal["native", "torch"]

_NO_TOKEN = 1 << 40
"""Larger than any token id, exact in float64."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """Sampling parameters and key of a row of logits."""

    params: SamplingParams
    seed: int
    """Seed of the sequence, in [0, 2^63): random.sequence_seed."""
    position: int
    """Index in the sequence (prompt and response) of the token to be sampled."""
    context_ids: Sequence[int] | None = None
    """Ids of prompt and response so far; needed only with a repetition penalty."""


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """Sampled tokens and their log-probs, per row, equal on every tensor-parallel rank."""

    token_ids: list[int]
    logprobs: list[float]
    """Log-probs under the sampled distribution: processed, renormalised over the kept tokens. For a greedy row: as raw."""
    raw_logprobs: list[float]
    """Log-probs under the softmax of the raw logits."""


class NonFiniteLogits(ArithmeticError):
    """Raised for a row of logits without a softmax: it contains NaN or +inf, or only -inf."""


@dataclass(frozen=True, slots=True)
class PreparedRows:
    """Rows as tensors on the logits' device, for repeated calls of draw_on_device in a draft loop."""

    settings: RowSettings
    seeds: Tensor
    """int64 [n]."""
    positions: Tensor
    """int64 [n]."""
    noisy: Tensor
    """int64 [n]: 0 for greedy rows, else 1."""
    step: int = 0
    """Number of times that these rows were advanced."""

    @classmethod
    def of(cls, rows: Sequence[SamplingRow], device: torch.device) -> "PreparedRows":
        numbers = ([r.seed for r in rows], [r.position for r in rows], [int(r.params.temperature > 0) for r in rows])
        settings = RowSettings([r.params for r in rows], [r.context_ids for r in rows], device)
        seeds, positions, noisy = torch.tensor(numbers, device=device).unbind()
        return cls(settings, seeds, positions, noisy)

    def __len__(self) -> int:
        return len(self.settings.params)

    def first(self, count: int) -> "PreparedRows":
        """The first `count` rows."""
        if count == len(self):
            return self
        cut = (self.seeds[:count], self.positions[:count], self.noisy[:count])
        return PreparedRows(self.settings.first(count), *cut, self.step)

    def advance(self, token_ids: Tensor) -> "PreparedRows":
        """The rows at their next position, after token_ids (int64 [n], on the rows' device) were sampled at this one."""
        settings = self.settings.with_context(token_ids)
        return PreparedRows(settings, self.seeds, self.positions + 1, self.noisy, self.step + 1)


class Sampler:
    """Samples from logits whose columns may be sharded over a tensor-parallel group."""

    def __init__(
        self,
        vocab_size: int,
        vocab_start: int = 0,
        group: dist.ProcessGroup | None = None,
        kernel: SamplerKernel = "torch",
    ) -> None:
        """Ids from vocab_size on are padding and never sampled; vocab_start is this rank's first id.

        The native kernel is for CPU logits in bfloat16 or float32, and samples the same tokens as torch. Raises UserError if it
        can't run.
        """
        self.vocab_size = vocab_size
        self.vocab_start = vocab_start
        self.group = group
        self.kernel = kernel
        self._native = NativeSampling(torch.get_num_threads()) if kernel == "native" else None
        self._buffers: dict[object, Tensor] = {}

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> SampledTokens:
        """Sample one token per row of logits [n, V_local]. Collective over the group, with equal rows on every rank.

        Raises NonFiniteLogits, on every rank, for a row with NaN or without a finite logit.
        """
        if not rows:
            return SampledTokens([], [], [])
        facts, _ = self._examine(logits, rows, keep=False)
        return self.decide(facts, rows)

    def examine(self, logits: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, ShardLogits]:
        """This rank's facts [n, 6] about the tokens of `sample`, for `decide`, and the processed logits.

        The latter are valid until the next call. Collective if the rows are filtered.
        """
        facts, processed = self._examine(logits, rows, keep=True)
        assert processed is not None
        return facts, processed

    def _examine(self, logits: Tensor, rows: Sequence[SamplingRow], keep: bool) -> tuple[Tensor, ShardLogits | None]:
        """As `examine`; without `keep`, the native kernel does not store the processed logits."""
        prepared = PreparedRows.of(rows, logits.device)
        if self._native is None:
            raw = self.shard(logits)
            processed = process(raw, prepared.settings)
            return _facts(raw, processed, *_search(processed, prepared).best()), processed
        facts = torch.empty(len(rows), 6, dtype=torch.float64)
        return facts, self._run_native(self._native, logits, prepared, keep=keep, facts=facts)

    def draw_from(self, processed: ShardLogits, rows: Sequence[SamplingRow]) -> tuple[Tensor, Tensor]:
        """This rank's best token of each row of processed logits, as `draw`: value (float64 [n]) and id (int64 [n])."""
        prepared = PreparedRows.of(rows, processed.values.device)
        if self._native is None:
            return _search(processed, prepared).best()
        facts = self._given_facts(self._native, processed, prepared, wants_facts=False)
        return facts[:, 0], facts[:, 1].long()

    def normalizers(self, processed: ShardLogits) -> Tensor:
        """local_normalizer of processed logits, as the facts of rows have it."""
        if self._native is None:
            return processed.local_normalizer()
        rows = PreparedRows.of([SamplingRow(SamplingParams(), 0, 0)] * len(processed.values), processed.values.device)
        return self._given_facts(self._native, processed, rows, wants_facts=True)[:, 5]

    def _given_facts(self, kernel: NativeSampling, processed: ShardLogits, rows: PreparedRows, wants_facts: bool) -> Tensor:
        """Facts of rows sampled from processed logits, which are taken for the raw ones too."""
        given = processed.values
        grid = shard_grid(given.shape[1], self.vocab_size, processed.first_id)
        token = torch.empty(len(given), dtype=torch.int64)
        facts = torch.empty(len(given), 6, dtype=torch.float64)
        keys = (rows.seeds, rows.positions, rows.noisy)
        kernel(given, grid, *keys, processed=given, is_processed=True, token_ids=token, facts=facts, wants_facts=wants_facts)
        facts[:, 1] = token  # which is always a valid id
        return facts

    def restate(
        self, facts: Tensor, logits: Tensor, processed: ShardLogits, token: Tensor, value: Tensor | None = None
    ) -> Tensor:
        """Facts of the same rows about other tokens [n]. Without `value`: tokens known to all ranks."""
        column = token - self.vocab_start
        is_here = (column >= 0) & (column < logits.shape[1])
        column = column.clamp(0, logits.shape[1] - 1)
        known = torch.where(is_here, 0.0, -math.inf).double()
        raw = logits.gather(-1, column.unsqueeze(-1)).squeeze(-1).double()
        kept_column = (token - processed.first_id).clamp(0, processed.values.shape[1] - 1)
        kept = processed.values.gather(-1, kept_column.unsqueeze(-1)).squeeze(-1).double()
        columns = [known if value is None else value, token.double(), raw, facts[:, 3], kept, facts[:, 5]]
        return torch.stack(columns, dim=-1)

    def decide(self, facts: Tensor, rows: Sequence[SamplingRow]) -> SampledTokens:
        """The tokens with the highest values over all ranks, and their log-probs. Collective; raises NonFiniteLogits."""
        return _decide(gather(facts, self.group), rows)

    def prepare(self, rows: Sequence[SamplingRow], device: torch.device) -> PreparedRows:
        """Input of draw_on_device; preparing it copies from the host."""
        return PreparedRows.of(rows, device)

    def draw_on_device(self, logits: Tensor, rows: PreparedRows) -> tuple[Tensor, ShardLogits]:
        """Sample as `sample` without waiting for the device, from a drafter's logits [n, V_local]. Collective.

        A row without a softmax yields some valid id: verification rejects a bad draft.

        Returns: token ids (int64 [n]) and the processed logits that they were sampled from. The latter are valid until a call
        with rows that were advanced equally often.
        """
        token_ids, processed = self._draw(logits, rows, keep=True)
        assert processed is not None
        return token_ids, processed

    def draw_ids_on_device(self, logits: Tensor, rows: PreparedRows) -> Tensor:
        """As draw_on_device without the processed logits, which is cheaper."""
        return self._draw(logits, rows, keep=False)[0]

    def _draw(self, logits: Tensor, rows: PreparedRows, keep: bool) -> tuple[Tensor, ShardLogits | None]:
        if self._native is not None:
            return self._draw_native(self._native, logits, rows, keep)
        processed = self._processed(self.shard(logits, ("raw", rows.step)), rows, synchronize=False)
        return self._agree(*_search(processed, rows).best_of_all()), processed

    def _draw_native(
        self, kernel: NativeSampling, logits: Tensor, rows: PreparedRows, keep: bool
    ) -> tuple[Tensor, ShardLogits | None]:
        token = torch.empty(len(rows), dtype=torch.int64)
        if not self._is_sharded:
            return token, self._run_native(kernel, logits, rows, keep, token)
        facts = torch.empty(len(rows), 6, dtype=torch.float64)
        processed = self._run_native(kernel, logits, rows, keep, token, facts, wants_facts=False)
        return self._agree(facts[:, 0], token), processed

    def _agree(self, value: Tensor, token: Tensor) -> Tensor:
        """The ranks' common tokens [n], valid ids whatever the values. Collective."""
        if self._is_sharded:
            shards = gather(torch.stack([value, token.double()]), self.group)
            token = shards[:, 1].masked_fill(shards[:, 0] != shards[:, 0].amax(0), _NO_TOKEN).amin(0).long()
        return token.clamp_(0, self.vocab_size - 1)

    @property
    def _is_sharded(self) -> bool:
        return self.group is not None and self.group.size() > 1

    def _run_native(
        self,
        kernel: NativeSampling,
        logits: Tensor,
        rows: PreparedRows,
        keep: bool,
        token_ids: Tensor | None = None,
        facts: Tensor | None = None,
        wants_facts: bool = True,
    ) -> ShardLogits | None:
        """Fill this rank's token_ids [n] and facts [n, 6]. Returns the processed logits if `keep`."""
        settings = rows.settings
        grid = shard_grid(logits.shape[1], self.vocab_size, self.vocab_start)
        keys = (rows.seeds, rows.positions, rows.noisy)
        if settings.filters and self._is_sharded:  # floors need the other ranks' columns
            processed = self._processed(self.shard(logits, ("raw", rows.step)), rows, synchronize=True)
            given = processed.values
            kernel(
                logits,
                grid,
                *keys,
                processed=given,
                is_processed=True,
                token_ids=token_ids,
                facts=facts,
                wants_facts=wants_facts,
            )
            return processed
        out = self._buffer(("processed", rows.step), (len(rows), grid.width), logits.device) if keep else None
        kernel(
            logits,
            grid,
            *keys,
            temperature=settings.temperature,
            penalty=settings.penalty,
            context_ids=settings.context_ids,
            top_k=_pair(settings.top_k),
            top_p=_pair(settings.top_p),
            min_p=_pair(settings.min_p),
            processed=out,
            token_ids=token_ids,
            facts=facts,
            wants_facts=wants_facts,
        )
        return None if out is None else ShardLogits(out, grid.first_id, self.group, self.vocab_size)

    def _processed(self, raw: ShardLogits, rows: PreparedRows, synchronize: bool) -> ShardLogits:
        """The processed logits, in a buffer of the rows' step."""
        changes = rows.settings.changes_logits
        out = self._buffer(("processed", rows.step), raw.values.shape, raw.values.device) if changes else None
        return process(raw, rows.settings, synchronize, out)

    def shard(self, logits: Tensor, name: object = "sample") -> ShardLogits:
        """The logits as a shard, valid until the next call with this name: its buffer is reused and grows with the rows."""
        buffer = self._buffers.get(name)
        fits = buffer is not None and len(buffer) >= len(logits) and buffer.device == logits.device
        shard = shard_logits(logits, self.vocab_size, self.vocab_start, self.group, buffer if fits else None)
        if not fits:
            self._buffers[name] = shard.values
        return shard

    def _buffer(self, name: object, shape: Sequence[int], device: torch.device) -> Tensor:
        """A reused float32 tensor [n, W]."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < shape[0] or buffer.device != device:
            buffer = self._buffers[name] = torch.empty(*shape, device=device)
        return buffer[: shape[0]]


def _pair(rows: RowFilter | None) -> tuple[Tensor, Tensor] | None:
    return None if rows is None else (rows.rows, rows.values)


def draw(processed: ShardLogits, rows: Sequence[SamplingRow]) -> tuple[Tensor, Tensor]:
    """This rank's best token of each row: logit + noise (float64 [n]) and id (int64 [n]); -inf without a token."""
    return _search(processed, PreparedRows.of(rows, processed.values.device)).best()


def _search(processed: ShardLogits, rows: PreparedRows) -> "_Search":
    return _Search(processed.values, processed.first_id, stream_keys(rows.seeds, rows.positions), rows.noisy)


class _Search:
    """Gumbel-max over blocks: first a bound per block, then the tokens of the blocks that can win."""

    def __init__(self, x: Tensor, first_id: int, keys: Tensor, noisy: Tensor) -> None:
        self.x, self.first_id, self.keys, self.noisy = x, first_id, keys, noisy
        self.first_block = first_id // TILE * COLUMNS
        blocks = torch.arange(self.first_block, self.first_block + x.shape[1] // LANES, device=x.device)
        self.smallest, self.lane = block_exponentials(keys.unsqueeze(-1), blocks)  # [n, blocks]
        self.noise = self.smallest.log().neg_().mul_(noisy.unsqueeze(-1))

    def best(self) -> tuple[Tensor, Tensor]:
        n = self.x.shape[0]
        tiles = self.x.view(n, -1, LANES, COLUMNS)
        lead = tiles.gather(2, self.lane.view(n, -1, 1, COLUMNS)).view(n, -1).add(self.noise).amax(-1)
        bound = tiles.amax(2).view(n, -1).add(self.noise)  # promoted to float64 by torch
        every = torch.arange(n, device=self.x.device)
        _, values = self._tokens(every, bound.argmax(-1))
        reached = torch.maximum(lead, values.amax(-1))
        row, block = ((bound >= reached.unsqueeze(-1)) & (bound > -math.inf)).nonzero(as_tuple=True)
        ids, values = self._tokens(row, block)
        value = torch.full_like(reached, -math.inf).scatter_reduce_(0, row, values.amax(-1), "amax")
        ids = ids.masked_fill(values != value[row].unsqueeze(-1), _NO_TOKEN)
        return value, torch.full_like(every, _NO_TOKEN).scatter_reduce_(0, row, ids.amin(-1), "amin")

    def best_of_all(self) -> tuple[Tensor, Tensor]:
        """The same token with noise for every token: more work than `best`, but with shapes known beforehand."""
        n, width = self.x.shape
        ids = torch.arange(self.first_id, self.first_id + width, device=self.x.device).view(-1, LANES, COLUMNS)
        lanes = torch.arange(LANES, device=self.x.device).unsqueeze(-1)
        smallest, lane = (block.view(n, -1, 1, COLUMNS) for block in (self.smallest, self.lane))
        exponential = token_exponentials(self.keys.view(n, 1, 1, 1), ids, smallest, lanes == lane)
        noise = exponential.log_().neg_().view(n, width).mul_(self.noisy.unsqueeze(-1))
        value, column = noise.add_(self.x).max(-1)
        return value, column + self.first_id

    def _tokens(self, row: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and noisy logits [m, LANES] of blocks [m] (counted from this shard's first) in rows [m]."""
        lanes = torch.arange(LANES, device=self.x.device)
        column = block // COLUMNS * TILE + block % COLUMNS
        columns = column.unsqueeze(-1) + lanes * COLUMNS
        ids = columns + self.first_id
        is_smallest = lanes == self.lane[row, block].unsqueeze(-1)
        exponential = token_exponentials(
            self.keys[row].unsqueeze(-1), ids, self.smallest[row, block].unsqueeze(-1), is_smallest
        )
        noise = exponential.log_().neg_().mul_(self.noisy[row].unsqueeze(-1))
        return ids, noise.add_(self.x[row.unsqueeze(-1), columns])


def _facts(raw: ShardLogits, processed: ShardLogits, value: Tensor, token: Tensor) -> Tensor:
    """Facts of a shard for the others, float64 [n, 6]: its best value and id, that id's logits, and its normalizers."""
    column = (token - raw.first_id).clamp(0, raw.values.shape[1] - 1).unsqueeze(-1)
    normalizer = raw.local_normalizer()
    same = processed is raw
    return torch.stack(
        [
            value,
            token.double(),
            raw.values.gather(-1, column).squeeze(-1).double(),
            normalizer,
            processed.values.gather(-1, column).squeeze(-1).double(),
            normalizer if same else processed.local_normalizer(),
        ],
        dim=-1,
    )


def _decide(shards: Tensor, rows: Sequence[SamplingRow]) -> SampledTokens:
    """The winner of each row from all shards' facts [ranks, n, 6]."""
    decided = SampledTokens([], [], [])
    for index, facts in enumerate(zip(*shards.tolist(), strict=True)):  # facts of one row, by rank
        normalizer = _logsumexp([fact[3] for fact in facts])
        if not math.isfinite(normalizer):
            raise _non_finite(index, rows)
        best = max(fact[0] for fact in facts)
        _, token, raw, _, processed, _ = min((fact for fact in facts if fact[0] == best), key=lambda fact: fact[1])
        raw_logprob = raw - normalizer
        is_greedy = rows[index].params.temperature == 0
        decided.token_ids.append(int(token))
        decided.raw_logprobs.append(raw_logprob)
        decided.logprobs.append(raw_logprob if is_greedy else processed - _logsumexp([fact[5] for fact in facts]))
    return decided


def _logsumexp(values: Sequence[float]) -> float:
    """Log of the sum of exponentials; NaN if a value is NaN."""
    largest = max(values)
    if len(values) == 1 or not math.isfinite(largest):
        return sum(values) if any(math.isnan(v) for v in values) else largest
    return largest + math.log(math.fsum(math.exp(v - largest) for v in values))


def _non_finite(row: int, rows: Sequence[SamplingRow]) -> NonFiniteLogits:
    return NonFiniteLogits(
        f"row {row} of {len(rows)} (sequence seed {rows[row].seed}, position {rows[row].position}): the logits have no softmax "
        "(NaN, +inf or only -inf); look at the weights and the learning rate"
    )
