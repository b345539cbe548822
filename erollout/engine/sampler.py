"""Drawing the next token: Gumbel-max over processed logits, with noise keyed by (sequence seed, position, token id).

The token is argmax(logit + noise), the lowest id where equal. Since the noise is a pure function of the key, a row's token
does not depend on the other rows, on the batch or on the vocabulary's sharding, given equal logits. Only blocks of tokens
whose largest logit plus largest noise reaches a value already found are looked at: the same token as with noise for all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from erollout.engine.logits import RowSettings, ShardLogits, gather, process, shard_logits
from erollout.engine.random import COLUMNS, LANES, TILE, block_exponentials, stream_keys, token_exponentials
from erollout.types import SamplingParams

_NO_TOKEN = 1 << 40
"""Above any token id, exact in float64."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What a row of logits is sampled with."""

    params: SamplingParams
    seed: int
    """Of the sequence, in [0, 2^63): random.sequence_seed."""
    position: int
    """Index in the sequence (prompt and response) of the token to be drawn."""
    context_ids: Sequence[int] | None = None
    """Prompt and response so far; needed with a repetition penalty only."""


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One of each per row, the same on every tensor-parallel rank."""

    token_ids: list[int]
    logprobs: list[float]
    """Under the distribution that was sampled: processed, renormalised over the kept tokens. Of a greedy row: as raw."""
    raw_logprobs: list[float]
    """Under the softmax of the logits as they came."""


class NonFiniteLogits(ArithmeticError):
    """A row of logits that has no softmax: it contains NaN or +inf, or nothing but -inf."""


@dataclass(frozen=True, slots=True)
class PreparedRows:
    """Rows as tensors on the logits' device: what a draft loop hands to draw_on_device again and again."""

    settings: RowSettings
    seeds: Tensor
    """int64 [n]."""
    positions: Tensor
    """int64 [n]."""
    noisy: Tensor
    """float64 [n]: 0 where the draw is greedy, else 1."""
    step: int = 0
    """How often these rows were advanced."""

    @classmethod
    def of(cls, rows: Sequence[SamplingRow], device: torch.device) -> "PreparedRows":
        return cls(
            RowSettings([r.params for r in rows], [r.context_ids for r in rows], device),
            torch.tensor([r.seed for r in rows], device=device),
            torch.tensor([r.position for r in rows], device=device),
            torch.tensor([float(r.params.temperature > 0) for r in rows], dtype=torch.float64, device=device),
        )

    def __len__(self) -> int:
        return len(self.settings.params)

    def first(self, count: int) -> "PreparedRows":
        """The first `count` rows."""
        if count == len(self):
            return self
        cut = (self.seeds[:count], self.positions[:count], self.noisy[:count])
        return PreparedRows(self.settings.first(count), *cut, self.step)

    def advance(self, token_ids: Tensor) -> "PreparedRows":
        """The rows at their next position, once token_ids (int64 [n], on the rows' device) were drawn at this one."""
        settings = self.settings.with_context(token_ids)
        return PreparedRows(settings, self.seeds, self.positions + 1, self.noisy, self.step + 1)


class Sampler:
    """Samples from logits whose columns may be sharded over a tensor-parallel group."""

    def __init__(self, vocab_size: int, vocab_start: int = 0, group: dist.ProcessGroup | None = None) -> None:
        """The ids from vocab_size on are padding and never sampled; vocab_start is this rank's first id."""
        self.vocab_size = vocab_size
        self.vocab_start = vocab_start
        self.group = group
        self._buffers: dict[object, Tensor] = {}

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> SampledTokens:
        """One token for each row of logits [n, V_local]. Collective over the group: equal rows on every rank.

        Raises NonFiniteLogits, on every rank, for a row with NaN or without any finite logit.
        """
        if not rows:
            return SampledTokens([], [], [])
        prepared = PreparedRows.of(rows, logits.device)
        raw = self.shard(logits)
        processed = process(raw, prepared.settings)
        return self.settle(raw, processed, *_search(processed, prepared).best(), rows)

    def settle(
        self, raw: ShardLogits, processed: ShardLogits, value: Tensor, token: Tensor, rows: Sequence[SamplingRow]
    ) -> SampledTokens:
        """The token of highest value among the ranks' own tokens [n], and its log-probs. Collective; raises NonFiniteLogits."""
        return _decide(gather(_facts(raw, processed, value, token), self.group), rows)

    def prepare(self, rows: Sequence[SamplingRow], device: torch.device) -> PreparedRows:
        """What draw_on_device needs; making it copies from the host."""
        return PreparedRows.of(rows, device)

    def draw_on_device(self, logits: Tensor, rows: PreparedRows) -> tuple[Tensor, ShardLogits]:
        """What `sample` draws, without any wait for the device: a drafter's logits [n, V_local] as they are. Collective.

        A row without a softmax yields some valid id: a bad draft is for the verification to refuse.

        Returns: token ids (int64 [n]) and the processed logits that they were drawn from. The latter stay until a draw from
        rows that were advanced equally often.
        """
        raw = self.shard(logits, ("raw", rows.step))
        out = self._buffer(("processed", rows.step), raw.values) if rows.settings.changes_logits else None
        processed = process(raw, rows.settings, synchronize=False, out=out)
        value, token = _search(processed, rows).best_of_all()
        shards = gather(torch.stack([value, token.double()]), self.group)
        token = shards[:, 1].masked_fill(shards[:, 0] != shards[:, 0].amax(0), _NO_TOKEN).amin(0)
        return token.long().clamp_(0, self.vocab_size - 1), processed

    def shard(self, logits: Tensor, name: object = "sample") -> ShardLogits:
        """The logits as a shard, until the next call with this name: its buffer is kept and grows with the number of rows."""
        buffer = self._buffers.get(name)
        fits = buffer is not None and len(buffer) >= len(logits) and buffer.device == logits.device
        shard = shard_logits(logits, self.vocab_size, self.vocab_start, self.group, buffer if fits else None)
        if not fits:
            self._buffers[name] = shard.values
        return shard

    def _buffer(self, name: object, like: Tensor) -> Tensor:
        """A kept tensor of this shape, dtype and device."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < len(like) or buffer.device != like.device:
            buffer = self._buffers[name] = torch.empty_like(like)
        return buffer[: len(like)]


def draw(processed: ShardLogits, rows: Sequence[SamplingRow]) -> tuple[Tensor, Tensor]:
    """This rank's best token of each row: logit + noise (float64 [n]) and id (int64 [n]); -inf where it has no token."""
    return _search(processed, PreparedRows.of(rows, processed.values.device)).best()


def _search(processed: ShardLogits, rows: PreparedRows) -> "_Search":
    return _Search(processed.values, processed.first_id, stream_keys(rows.seeds, rows.positions), rows.noisy)


class _Search:
    """Gumbel-max over blocks: a bound for each block first, then the tokens of those blocks that can win."""

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
        bound = tiles.amax(2).view(n, -1).add(self.noise)  # torch promotes to float64
        every = torch.arange(n, device=self.x.device)
        _, values = self._tokens(every, bound.argmax(-1))
        reached = torch.maximum(lead, values.amax(-1))
        row, block = ((bound >= reached.unsqueeze(-1)) & (bound > -math.inf)).nonzero(as_tuple=True)
        ids, values = self._tokens(row, block)
        value = torch.full_like(reached, -math.inf).scatter_reduce_(0, row, values.amax(-1), "amax")
        ids = ids.masked_fill(values != value[row].unsqueeze(-1), _NO_TOKEN)
        return value, torch.full_like(every, _NO_TOKEN).scatter_reduce_(0, row, ids.amin(-1), "amin")

    def best_of_all(self) -> tuple[Tensor, Tensor]:
        """The same token with noise for every token: more work than `best`, of shapes that are known beforehand."""
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
    """What a shard tells the others, float64 [n, 6]: its best value and id, that id's logits and its normalizers."""
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
    shards = shards.cpu()
    normalizers = shards[:, :, 3].logsumexp(0)
    _check_finite(normalizers, rows)
    value = shards[:, :, 0]
    token = shards[:, :, 1].masked_fill(value != value.amax(0), _NO_TOKEN)
    winner = token.argmin(0)  # ids differ between shards, so the smallest one is unique
    chosen = shards[winner, torch.arange(len(rows))]
    raw = (chosen[:, 2] - normalizers).tolist()
    processed = (chosen[:, 4] - shards[:, :, 5].logsumexp(0)).tolist()
    logprobs = [r if row.params.temperature == 0 else p for row, r, p in zip(rows, raw, processed, strict=True)]
    return SampledTokens([int(i) for i in chosen[:, 1].tolist()], logprobs, raw)


def _check_finite(normalizers: Tensor, rows: Sequence[SamplingRow]) -> None:
    if bool(normalizers.isfinite().all()):
        return
    bad = int((~normalizers.isfinite()).nonzero()[0])
    raise NonFiniteLogits(
        f"row {bad} of {len(rows)} (sequence seed {rows[bad].seed}, position {rows[bad].position}): the logits have no softmax "
        "(NaN, +inf or only -inf); look at the weights and the learning rate"
    )
