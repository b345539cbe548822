"""What an interrupted rollout leaves: bit for bit through a file, the best of several, for the same requests alone."""

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from erollout.rollout.partial import PartialRollouts, fingerprint, merge_samples
from erollout.types import PartialRollout, RolloutRequest, SamplingParams

REQUESTS = [RolloutRequest(index, (1, 2, index), 3, SamplingParams(), 10 + index) for index in (4, 7)]
LOGPROBS = st.floats(max_value=0.0, allow_nan=False)


@st.composite
def samples(draw: st.DrawFn) -> PartialRollout:
    ids = draw(st.lists(st.integers(0, 2**31 - 1), max_size=5))
    logprobs, raw = (tuple(draw(st.lists(LOGPROBS, min_size=len(ids), max_size=len(ids)))) for _ in range(2))
    reason = draw(st.sampled_from([None, "stop", "length"]))
    mask = tuple(draw(st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids))))
    return PartialRollout(draw(st.sampled_from([4, 7])), draw(st.integers(0, 2)), tuple(ids), logprobs, raw, reason, mask)


@given(st.lists(samples(), max_size=8))
def test_a_file_keeps_every_bit(kept: list[PartialRollout]) -> None:
    ours = PartialRollouts(fingerprint(REQUESTS), tuple(kept))
    theirs = PartialRollouts.from_bytes(ours.to_bytes())
    assert repr(theirs) == repr(ours)  # which tells -0.0 from 0.0


def test_a_file_without_masks_is_of_sampled_tokens_alone() -> None:
    kept = PartialRollouts("f", (PartialRollout(4, 1, (5, 6), (-0.5, -1.0), (-0.5, -1.0), None, (1, 0)),))
    with np.load(io.BytesIO(kept.to_bytes())) as arrays:
        before = {name: arrays[name] for name in arrays if name != "loss_mask"}
    file = io.BytesIO()
    np.savez(file, **before)
    (sample,) = PartialRollouts.from_bytes(file.getvalue()).samples
    assert sample.loss_mask == (1, 1) and sample.response_ids == (5, 6)


@given(st.lists(samples(), max_size=12))
def test_the_complete_or_longest_one_is_kept_of_each(found: list[PartialRollout]) -> None:
    kept = merge_samples(REQUESTS, found)
    for sample in found:
        ours = [s for s in kept.samples if (s.prompt_index, s.sample_index) == (sample.prompt_index, sample.sample_index)]
        assert len(ours) == bool(ours) and (ours or not sample.response_ids)
        if sample.finish_reason and sample.response_ids:
            assert ours[0].finish_reason
        if ours and not ours[0].finish_reason:
            assert len(ours[0].response_ids) >= len(sample.response_ids)
    assert set(kept.samples) <= set(found)


def test_requests_know_what_is_left_of_them() -> None:
    done = PartialRollout(4, 1, (5,), (-0.5,), (-0.5,), "stop")
    begun = PartialRollout(4, 2, (5, 6), (-0.5, -1.0), (-0.5, -1.0))
    first, second = merge_samples(REQUESTS, [begun, done]).resume(REQUESTS)
    assert (first.finished, first.begun, first.num_open) == ({1}, (begun,), 2)
    assert second == REQUESTS[1] and second.num_open == 3


@pytest.mark.parametrize(
    "change", [{"seed": 0}, {"prompt_ids": (1, 2)}, {"group_size": 4}, {"sampling": SamplingParams(top_k=5)}]
)
def test_the_fingerprint_is_of_what_was_asked_for(change: dict[str, object]) -> None:
    part = PartialRollout(4, 2, (5,), (-0.5,), (-0.5,))
    assert fingerprint(merge_samples(REQUESTS, [part]).resume(REQUESTS)) == fingerprint(REQUESTS)
    assert fingerprint([replace(REQUESTS[0], **change), REQUESTS[1]]) != fingerprint(REQUESTS)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:40], lambda data: data[:200] + b"?" + data[201:]])
def test_damage_is_a_value_error(damage: object) -> None:
    data = PartialRollouts("f", (PartialRollout(4, 1, (5,), (-0.5,), (-0.5,), "stop"),)).to_bytes()
    with pytest.raises(ValueError, match=r"partial rollouts|file"):
        PartialRollouts.from_bytes(damage(data))  # type: ignore[operator]
