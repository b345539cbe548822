"""What a replica's curve says of any number of sequences. Pure."""

from bisect import bisect_left
from collections.abc import Sequence

from erollout.coordinator.occupancy import CURVE_BATCHES

PREFILL_TOKENS = 2048
"""Size of the prompt whose predicted seconds per token count for all: a short one seems free beside the weights."""


def seconds_per_token(curve: Sequence[float], sequences: float, max_num_seqs: int) -> float:
    """Seconds in which each of so many sequences gets one token, on the mean, where only max_num_seqs run at once.

    Linear between CURVE_BATCHES, in proportion to the batch beyond the last.

    Args:
        curve: seconds at CURVE_BATCHES; empty where nothing is known: then every batch takes as long.
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
