"""Which drafts the target takes over, and the token that follows them: two ways, both exactly the target's distribution.

`coupled` (drafter-invariant speculative decoding, arXiv 2408.07978): the target draws its own token at every draft, with the
noise of that position, and takes drafts over as long as they are what it drew. The output is that of decoding without drafts,
token for token, whatever the drafts are.

`rejection` (arXiv 2211.17192, arXiv 2302.01318): a draft x, drawn from q with noise of its own, is accepted with probability
min(1, p(x) / q(x)); the first rejected one is replaced by a token from norm(max(p - q, 0)), and a bonus token from p follows
when none is rejected. p and q are what is sampled from, after penalties, temperature and filters. A certain draft has q = 1;
where the drafter's logits have no softmax, q counts as 0: the draft is rejected and replaced by a token from p, which is
exact whatever it was. The replacement and the bonus token use the target's noise of their position, which nothing else has
used. A greedy sequence has one possible token at every position, so both ways compare with it.

The vocabulary may be sharded: every decision is taken on every rank, from gathered numbers.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from erollout.engine.logits import ShardLogits, gather, process_logits
from erollout.engine.proposer import Drafts
from erollout.engine.random import acceptance_seed, stream_keys, uniforms
from erollout.engine.sampler import SampledTokens, Sampler, SamplingRow, draw
from erollout.engine.sequence import Sequence

Verification = Literal["coupled", "rejection"]

_FLOOR = 1e-30
"""Least weight of a token in the residual, relative to p: where p and q differ by rounding alone, p itself is left."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence whose next tokens are to be decided. It has 1 + num_drafts rows of logits."""

    row: SamplingRow
    """Of its next token."""
    num_drafts: int = 0
    column: int = 0
    """Of the sequence in Drafts."""

    @property
    def is_greedy(self) -> bool:
        return self.row.params.temperature == 0


@dataclass(frozen=True, slots=True)
class VerifiedRun:
    """A sequence's next tokens: the accepted drafts and the recovered or bonus token."""

    token_ids: list[int]
    logprobs: list[float]
    """As in SampledTokens."""
    raw_logprobs: list[float]

    @property
    def num_accepted(self) -> int:
        return len(self.token_ids) - 1

    def then(self, tokens: SampledTokens, row: int) -> "VerifiedRun":
        """This run and the token of a row."""
        return VerifiedRun(
            [*self.token_ids, tokens.token_ids[row]],
            [*self.logprobs, tokens.logprobs[row]],
            [*self.raw_logprobs, tokens.raw_logprobs[row]],
        )


class Verifier:
    def __init__(self, sampler: Sampler, verification: Verification = "coupled") -> None:
        self.sampler = sampler
        self.verification = verification

    def verify(self, logits: Tensor, candidates: list[Candidate], drafts: Drafts | None = None) -> list[VerifiedRun]:
        """The next tokens of each candidate, at least one. Collective over the sampler's group.

        Args:
            logits: the target's, [rows, local vocabulary]: 1 + num_drafts rows of each candidate in turn, after its last known
                token and after each draft.
            drafts: may be None when no candidate has any.

        Raises NonFiniteLogits, on every rank, when a row has no softmax.
        """
        if drafts is None or self.verification == "coupled":
            return self._couple(logits, candidates, drafts)
        drawn = [not candidate.is_greedy for candidate in candidates]
        if all(drawn):
            return self._reject(logits, candidates, drafts)
        runs = iter(self._couple(*_part(logits, candidates, [not d for d in drawn]), drafts))
        others = iter(self._reject(*_part(logits, candidates, drawn), drafts) if any(drawn) else ())
        return [next(others if d else runs) for d in drawn]

    def _couple(self, logits: Tensor, candidates: list[Candidate], drafts: Drafts | None) -> list[VerifiedRun]:
        sampled = self.sampler.sample(logits, _rows(candidates, drafts))
        if drafts is None:
            return [_run(sampled, i, i + 1) for i in range(len(candidates))]
        draft_ids = drafts.token_ids.tolist()
        runs, start = [], 0
        for candidate in candidates:
            accepted = 0
            while accepted < candidate.num_drafts and (
                draft_ids[accepted][candidate.column] == sampled.token_ids[start + accepted]
            ):
                accepted += 1
            runs.append(_run(sampled, start, start + accepted + 1))
            start += 1 + candidate.num_drafts
        return runs

    def _reject(self, logits: Tensor, candidates: list[Candidate], drafts: Drafts) -> list[VerifiedRun]:
        rows = _rows(candidates, drafts)
        raw = self.sampler.shard(logits)
        processed = process_logits(raw, [row.params for row in rows], [row.context_ids for row in rows])
        drafted = self._drafted(raw, processed, rows, candidates, drafts)
        accepted = _num_accepted(candidates, rows, drafted, _draft_logprobs(drafts))
        last = [start + n for start, n in zip(_starts(candidates), accepted, strict=True)]
        following = self._following(raw, processed, rows, candidates, accepted, last, drafts)
        return [_run(drafted, end - n, end).then(following, i) for i, (end, n) in enumerate(zip(last, accepted, strict=True))]

    def _drafted(
        self, raw: ShardLogits, processed: ShardLogits, rows: list[SamplingRow], candidates: list[Candidate], drafts: Drafts
    ) -> SampledTokens:
        """The drafts and their log-probs under the target, at the rows that they were drawn for; anything at the others."""
        device = raw.values.device
        token = torch.zeros(len(rows), dtype=torch.int64, device=device)
        draft_rows = torch.tensor(_draft_rows(candidates), dtype=torch.int64, device=device)
        token.index_copy_(0, draft_rows, _in_order(candidates, drafts))
        return self.sampler.settle(raw, processed, _at(raw, token), token, rows)

    def _following(
        self,
        raw: ShardLogits,
        processed: ShardLogits,
        rows: list[SamplingRow],
        candidates: list[Candidate],
        accepted: list[int],
        last: list[int],
        drafts: Drafts,
    ) -> SampledTokens:
        """The recovered or bonus token of each candidate, from row `last` of the logits."""
        index = torch.tensor(last, device=raw.values.device)
        last_raw = replace(raw, values=raw.values.index_select(0, index))
        last_processed = last_raw if processed is raw else replace(processed, values=processed.values.index_select(0, index))
        rejected = [i for i, c in enumerate(candidates) if accepted[i] < c.num_drafts]
        source = last_processed
        if rejected:
            where = [(accepted[i], candidates[i].column) for i in rejected]
            source = _with_residuals(last_processed, rejected, where, drafts)
        last_rows = [rows[i] for i in last]
        return self.sampler.settle(last_raw, last_processed, *draw(source, last_rows), last_rows)


def sampling_row(sequence: Sequence) -> SamplingRow:
    """What a sequence's next token is sampled with."""
    position = sequence.num_tokens
    needs_context = sequence.sampling.repetition_penalty != 1.0
    context = sequence.tokens(0, position) if needs_context else None
    return SamplingRow(params=sequence.sampling, seed=sequence.seed, position=position, context_ids=context)


def _num_accepted(
    candidates: list[Candidate], rows: list[SamplingRow], drafted: SampledTokens, draft_logprobs: list[list[float]] | None
) -> list[int]:
    """How many leading drafts of each candidate are accepted."""
    seeds = torch.tensor([acceptance_seed(row.seed) for row in rows])
    positions = torch.tensor([row.position for row in rows])
    thresholds = uniforms(stream_keys(seeds, positions), torch.zeros_like(seeds)).log_().tolist()
    counts = []
    for start, candidate in zip(_starts(candidates), candidates, strict=True):
        accepted = 0
        while accepted < candidate.num_drafts:
            log_p = drafted.logprobs[start + accepted]
            log_q = draft_logprobs[accepted][candidate.column] if draft_logprobs is not None else 0.0
            if not (math.isfinite(log_q) and thresholds[start + accepted] < log_p - log_q):
                break
            accepted += 1
        counts.append(accepted)
    return counts


def _draft_logprobs(drafts: Drafts) -> list[list[float]] | None:
    """log q of every draft, by position and column; not finite where q is 0. Collective. None: every draft was certain."""
    if drafts.processed is None:
        return None
    parts = []
    for token, processed in zip(drafts.token_ids, drafts.processed, strict=True):
        token = token[: len(processed.values)]
        parts.append(torch.stack([_at(processed, token), processed.local_normalizer()]))
    shards = gather(torch.cat(parts, dim=-1), drafts.processed[0].group).cpu()  # [ranks, 2, drafts]
    logprobs = (shards[:, 0].amax(0) - shards[:, 1].logsumexp(0)).split([part.shape[1] for part in parts])
    return [part.tolist() for part in logprobs]


def _with_residuals(target: ShardLogits, rejected: list[int], where: list[tuple[int, int]], drafts: Drafts) -> ShardLogits:
    """The target's logits, in the `rejected` rows replaced by log max(p - q, 0). Collective.

    Args:
        where: (draft position, column) of each rejected draft.
    """
    index = torch.tensor(rejected, device=target.values.device)
    p = replace(target, values=target.values.index_select(0, index)).logprobs().exp_()
    if drafts.processed is None:
        q = torch.zeros_like(p)
        column = torch.stack([drafts.token_ids[step, column] for step, column in where]) - target.first_id
        is_here = (column >= 0) & (column < p.shape[1])
        q.scatter_(1, column.clamp(0, p.shape[1] - 1).unsqueeze(-1), is_here.to(q.dtype).unsqueeze(-1))
    else:
        values = torch.stack([drafts.processed[step].values[column] for step, column in where])
        q = replace(target, values=values).logprobs().exp_().nan_to_num_(0.0)
    residual = torch.maximum(p - q, p * _FLOOR).log_()
    return replace(target, values=target.values.index_copy(0, index, residual))


def _at(logits: ShardLogits, token: Tensor) -> Tensor:
    """Logit of one token per row, float64 [n]; -inf where the token is another rank's."""
    column = token - logits.first_id
    width = logits.values.shape[1]
    values = logits.values.gather(-1, column.clamp(0, width - 1).unsqueeze(-1)).squeeze(-1).double()
    return values.masked_fill_((column < 0) | (column >= width), -math.inf)


def _rows(candidates: list[Candidate], drafts: Drafts | None) -> list[SamplingRow]:
    """What each row of logits is sampled with, draft by draft."""
    if drafts is None:
        return [candidate.row for candidate in candidates]
    penalized = any(candidate.row.context_ids is not None for candidate in candidates)
    draft_ids = drafts.token_ids.tolist() if penalized else []
    rows = []
    for candidate in candidates:
        row, context = candidate.row, candidate.row.context_ids
        rows.append(row)
        for i in range(candidate.num_drafts):
            if context is not None:
                context = [*context, draft_ids[i][candidate.column]]
            rows.append(SamplingRow(row.params, row.seed, row.position + i + 1, context))
    return rows


def _part(logits: Tensor, candidates: list[Candidate], wanted: list[bool]) -> tuple[Tensor, list[Candidate]]:
    """Some of the candidates and their rows."""
    starts = _starts(candidates)
    rows = [row for s, c, w in zip(starts, candidates, wanted, strict=True) if w for row in range(s, s + 1 + c.num_drafts)]
    part = [candidate for candidate, w in zip(candidates, wanted, strict=True) if w]
    return logits.index_select(0, torch.tensor(rows, device=logits.device)), part


def _starts(candidates: list[Candidate]) -> list[int]:
    """First row of each candidate."""
    starts, row = [], 0
    for candidate in candidates:
        starts.append(row)
        row += 1 + candidate.num_drafts
    return starts


def _draft_rows(candidates: list[Candidate]) -> list[int]:
    """The rows whose token was drafted: all but the last of each candidate."""
    return [s + i for s, c in zip(_starts(candidates), candidates, strict=True) for i in range(c.num_drafts)]


def _in_order(candidates: list[Candidate], drafts: Drafts) -> Tensor:
    return drafts.runs((candidate.column, candidate.num_drafts) for candidate in candidates)


def _run(tokens: SampledTokens, start: int, end: int) -> VerifiedRun:
    """The tokens of rows [start, end)."""
    return VerifiedRun(tokens.token_ids[start:end], tokens.logprobs[start:end], tokens.raw_logprobs[start:end])
