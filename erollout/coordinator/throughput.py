"""Seconds per token at any number of sequences, interpolated from a replica's reported curve. Pure."""

from bisect import bisect_left
from collections.abc import Sequence

from erollout.coordinator.occupancy import CURVE_BATCHES


def seconds_per_token(curve: Sequence[float], sequences: float, max_num_seqs: int) -> float:
    """Mean seconds in which each of `sequences` gets one token, when at most max_num_seqs run at once.

    Linear between CURVE_BATCHES, in proportion to the batch beyond the last.

    Args:
        curve: seconds at CURVE_BATCHES; empty: nothing is known, and every batch takes the same time.
    """
    if sequences > max_num_seqs:
        return sequences / max_num_seqs * seconds_per_token(curve, max_num_seqs, max_num_seqs)
    if not curve:
        return 1.0
    upper = bisect_left(CURVE_BATCHES, sequences)
    if upper == 0:
        return curve[0]
    if upper == len(CURVE_BATCHES):
        return curve[-1] * sequences / CURVE_BATCHES[-1]
    low = CURVE_BATCHES[upper - 1]
    return curve[upper - 1] + (curve[upper] - curve[upper - 1]) * (sequences - low) / low
