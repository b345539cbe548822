"""A token's bits depend on its own sequence alone, at each level of instructions that this machine has or can be held to.

What a library does with a matrix product depends on the processor, so one machine stands for many: each level is a process with
environment variables that lower what oneDNN, MKL, torch and our own kernels use.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from erollout.kernels.native import processor_flags

LEVELS: dict[str, tuple[str, dict[str, str]]] = {
    "own": ("", {}),
    "two-threads": ("", {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}),
    "sse": ("", {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ATEN_CPU_CAPABILITY": "default"}),
    "compatible": ("", {"MKL_CBWR": "COMPATIBLE", "EROLLOUT_MAX_CPU_ISA": "none"}),
    "avx2": (
        "avx2",
        {
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "ATEN_CPU_CAPABILITY": "avx2",
            "EROLLOUT_MAX_CPU_ISA": "avx2",
        },
    ),
    "avx512": ("avx512f", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"}),
    "avx512-bf16": ("avx512_bf16", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_ENABLE_INSTRUCTIONS": "AVX512"}),
}
"""By name: what the processor must have for the level to differ from its own, and the variables."""
SLOW = ("two-threads", "compatible")


@pytest.mark.parametrize(
    ("level", "step"),
    [("own", 13), *(pytest.param(level, 13 if level in SLOW else 1, marks=pytest.mark.full) for level in LEVELS)],
)
def test_bits_do_not_depend_on_the_company(level: str, step: int) -> None:
    needs, variables = LEVELS[level]
    if needs and needs not in processor_flags():
        pytest.skip(f"this processor has no {needs}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    script = Path(__file__).parents[1] / "row_invariance.py"
    done = subprocess.run([sys.executable, script, str(step)], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
