"""What a replica's curve says of any number of sequences. Pure."""

from collections.abc import Sequence

from erollout.coordinator.occupancy import CURVE_BATCHES


def seconds_per_token(curve: Sequence[float], sequences: float, max_num_seqs: int) -> float:
    """Seconds in which each of so many sequences gets one token, on the mean, where only max_num_seqs run at once.

    Linear between CURVE_BATCHES, in proportion to the batch beyond the last.

    Args:
        curve: seconds at CURVE_BATCHES; empty where nothing is known: then every batch takes as long.
    """
    batch = min(max(sequences, 1.0), float(max_num_seqs))
    queueing = max(1.0, sequences / max_num_seqs)
    if not curve:
        return queueing
    upper = (int(batch) - 1).bit_length() if batch == int(batch) else int(batch).bit_length()
    if upper >= len(CURVE_BATCHES):
        return queueing * curve[-1] * batch / CURVE_BATCHES[-1]
    if upper == 0 or batch == CURVE_BATCHES[upper]:
        return queueing * curve[upper]
    low = CURVE_BATCHES[upper - 1]
    return queueing * (curve[upper - 1] + (curve[upper] - curve[upper - 1]) * (batch - low) / low)
