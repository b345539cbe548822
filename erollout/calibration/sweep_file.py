"""Measured times of single steps as a CSV file: written by `erollout calibrate sweep`, read by fit and validate. Pure.

Columns as in the reference implementation's sweeps (model,batch,seq,gamma,mode,mean_ms,median_ms,std_ms,min_ms,max_ms,n_samples),
and after them ours, which a file may lack: format,hardware,tensor_model_parallel_size.
"""

from dataclasses import dataclass
from typing import Literal

Mode = Literal["target_decode", "drafter_decode", "target_verify", "target_decode_sd"]


@dataclass(frozen=True, slots=True)
class SweepRow:
    model: str
    batch: int
    """Sequences; 0 with seq 0: an aggregate that is not a point."""
    seq: int
    """Tokens of context of each."""
    gamma: int
    """num_speculative_tokens; 0 in target_decode."""
    mode: Mode
    """target_decode: an AR step. drafter_decode: one step of the drafter. target_verify: the pass over 1 + gamma tokens of each
    sequence with the decision. target_decode_sd: an AR step of an engine that has a drafter but does not use it."""
    mean_ms: float
    median_ms: float
    std_ms: float
    min_ms: float
    max_ms: float
    n_samples: int
    format: str = ""
    """Of the drafter; "" in a file that does not say."""
    hardware: str = ""
    tensor_model_parallel_size: int = 1
