"""Partial rollouts: samples of an interrupted rollout, to be resumed by a later attempt. Pure."""

import hashlib
import io
import json
import logging
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np

from erollout.types import FinishReason, PartialRollout, Prompt, Rollout, RolloutRequest

logger = logging.getLogger(__name__)

_REASONS: tuple[FinishReason | None, ...] = (None, "stop", "length")


@dataclass(frozen=True, slots=True)
class PartialRollouts:
    """Complete and partial samples of one rollout. Random numbers are functions of position, so any replica of any layout can
    resume them."""

    fingerprint: str
    """Fingerprint of the rollout's requests: samples of other requests don't fit."""
    samples: tuple[PartialRollout, ...]
    """At most one per prompt and sample index, each with tokens."""

    @property
    def finished(self) -> list[PartialRollout]:
        return [sample for sample in self.samples if sample.finish_reason is not None]

    @property
    def begun(self) -> list[PartialRollout]:
        return [sample for sample in self.samples if sample.finish_reason is None]

    @property
    def num_tokens(self) -> int:
        """Tokens that are not sampled again."""
        return sum(sample.num_sampled for sample in self.samples)

    def summary(self, num_samples: int) -> str:
        """Summary in words. `num_samples`: number of samples of the whole rollout."""
        return f"{len(self.finished)} of {num_samples} samples finished, {self.num_tokens:,} tokens kept"

    def completed(self, prompts: Mapping[int, Prompt], policy_version: int) -> list[Rollout]:
        """The complete samples as rollouts; `prompts` by index."""
        return [
            Rollout(
                part.prompt_index,
                part.sample_index,
                prompts[part.prompt_index].prompt_ids,
                part.response_ids,
                part.logprobs,
                part.raw_logprobs,
                part.finish_reason,
                policy_version,
                part.loss_mask,
            )
            for part in self.samples
            if part.finish_reason is not None
        ]

    def resume(self, requests: Sequence[RolloutRequest]) -> list[RolloutRequest]:
        """The requests for the remaining samples."""
        finished, begun = defaultdict[int, list[int]](list), defaultdict[int, list[PartialRollout]](list)
        for sample in self.samples:
            if sample.finish_reason is not None:
                finished[sample.prompt_index].append(sample.sample_index)
            else:
                begun[sample.prompt_index].append(sample)
        return [replace(r, finished=frozenset(finished[r.prompt_index]), begun=tuple(begun[r.prompt_index])) for r in requests]

    def to_bytes(self) -> bytes:
        """Serialise, with log-probs bit-exact."""
        places = [(s.prompt_index, s.sample_index, len(s.response_ids), _REASONS.index(s.finish_reason)) for s in self.samples]
        file = io.BytesIO()
        np.savez(
            file,
            fingerprint=np.array(self.fingerprint),
            places=np.array(places, np.int64).reshape(-1, 4),
            response_ids=_joined([s.response_ids for s in self.samples], np.int32),
            logprobs=_joined([s.logprobs for s in self.samples], np.float64),
            raw_logprobs=_joined([s.raw_logprobs for s in self.samples], np.float64),
            loss_mask=_joined([s.loss_mask for s in self.samples], np.int8),
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The inverse of `to_bytes`. Raises ValueError for anything else."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                fingerprint, places = str(arrays["fingerprint"]), arrays["places"].tolist()
                columns = [arrays[name] for name in ("response_ids", "logprobs", "raw_logprobs")]
                if "loss_mask" in arrays:  # a file of an earlier version has none: all tokens were sampled
                    columns.append(arrays["loss_mask"])
        except (zipfile.BadZipFile, EOFError, KeyError, OSError) as error:
            raise ValueError(f"not partial rollouts: {error}") from error
        samples, start = [], 0
        for prompt_index, sample_index, length, reason in places:
            ids, logprobs, raw, *mask = (tuple(column[start : start + length].tolist()) for column in columns)
            samples.append(PartialRollout(prompt_index, sample_index, ids, logprobs, raw, _REASONS[reason], *mask))
            start += length
        return cls(fingerprint, tuple(samples))


class RolloutInterrupted(Exception):
    """Raised on all ranks if a stop was requested during a rollout."""

    def __init__(self, partial_rollouts: PartialRollouts | None = None) -> None:
        """`partial_rollouts`: for another attempt; None: in an evaluation, which starts over."""
        super().__init__("the rollout was interrupted")
        self.partial_rollouts = partial_rollouts

    @property
    def has_samples(self) -> bool:
        """Whether there are samples for another attempt."""
        return self.partial_rollouts is not None and bool(self.partial_rollouts.samples)


def as_partial(rollout: Rollout) -> PartialRollout:
    """A complete rollout as a PartialRollout."""
    return PartialRollout(
        rollout.prompt_index,
        rollout.sample_index,
        rollout.response_ids,
        rollout.rollout_logprobs,
        rollout.raw_logprobs,
        rollout.finish_reason,
        rollout.loss_mask,
    )


def merge_samples(requests: Sequence[RolloutRequest], samples: Iterable[PartialRollout]) -> PartialRollouts:
    """Merge samples of several replicas and attempts: per sample the complete one, else the longest."""
    best: dict[tuple[int, int], PartialRollout] = {}
    for sample in samples:
        key = sample.prompt_index, sample.sample_index
        if sample.response_ids and (key not in best or _progress(sample) > _progress(best[key])):
            best[key] = sample
    return PartialRollouts(fingerprint(requests), tuple(best[key] for key in sorted(best)))


def fitting(found: PartialRollouts | None, requests: Sequence[RolloutRequest], step: int) -> PartialRollouts:
    """The samples that the rollout after `step` steps can resume: all, or none if its requests differ."""
    nothing = PartialRollouts("", ())
    if found is None:
        return nothing
    if found.fingerprint != fingerprint(requests):
        logger.warning(
            "the partial rollouts of step %d are dropped (%d tokens): the configuration now requests other "
            "samples (prompts, group size, seed or distribution)",
            step + 1,
            found.num_tokens,
        )
        return nothing
    total = sum(request.group_size for request in requests)
    logger.info("resuming the interrupted rollout of step %d: %s", step + 1, found.summary(total))
    return found


def fingerprint(requests: Sequence[RolloutRequest]) -> str:
    """Fingerprint of the prompts, seeds and distribution of requests, whatever is completed."""
    rows = [asdict(replace(request, finished=frozenset(), begun=())) | {"finished": None} for request in requests]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _joined(parts: Sequence[Sequence[float]], dtype: type[np.number[Any]]) -> "np.ndarray[Any, Any]":
    return np.concatenate([np.empty(0, dtype), *(np.array(part, dtype) for part in parts)])


def _progress(sample: PartialRollout) -> tuple[bool, int]:
    return sample.finish_reason is not None, len(sample.response_ids)
