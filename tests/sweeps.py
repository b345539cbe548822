"""Sweeps of a machine whose truth is known, and `erollout calibrate` inside this process."""

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from math import exp

from erollout.calibration.commands import add_commands
from erollout.calibration.file import Identity
from erollout.calibration.model_size import describe_shape, model_size
from erollout.calibration.sweep_file import SweepRow
from erollout.drafter.registry import draft_weights
from erollout.policy.families import published_architecture
from erollout.speculation.cost.cost_model import PassTimes
from erollout.speculation.cost.roofline import PassCost, Roofline

MODEL = "Qwen2.5-7B"
ARCHITECTURE = published_architecture(MODEL)
assert ARCHITECTURE is not None
SIZE = model_size(ARCHITECTURE, draft_weights(["w4a16"]))
IDENTITY = Identity(describe_shape(ARCHITECTURE), "A100", 1, ("w4a16",), "bfloat16", "torch")
BATCHES, DRAFTS = (1, 4, 8, 16, 20, 24, 32, 48, 64), (3, 7)


def machine() -> PassTimes:
    """A GPU whose matmuls work in tiles: 128 rows of the target, 16 of the drafter."""
    shared = PassCost(1.6e12, 280e12, kv_factor=0.5, per_pass=3e-4, per_sequence=4e-5, tile=128)
    draft = PassCost(1.6e12, 280e12, kv_factor=0.5, per_pass=3e-4, per_sequence=1e-4, sequence_tile=16)
    return PassTimes(Roofline(SIZE, shared, replace(shared, per_token=1.8e-5), {"w4a16": draft}))


def sweep(
    noise: float = 0.005,
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] = (512, 2048),
    drafts: Sequence[int] = DRAFTS,
) -> list[SweepRow]:
    """What the machine shows."""
    truth, rng, rows = machine(), random.Random(0), []

    def add(batch: int, context: int, n: int, mode: str, seconds: float) -> None:
        ms = 1e3 * seconds * exp(rng.gauss(0.0, noise))
        texts = ("", "A100", 1, describe_shape(ARCHITECTURE), "bfloat16", "torch")
        rows.append(SweepRow(MODEL, batch, context, n, mode, ms, ms, 0.1, 0.9 * ms, 1.2 * ms, 30, *texts))  # type: ignore[arg-type]

    for batch in batches:
        for context in contexts:
            add(batch, context, 0, "target_decode", truth.target_seconds(batch, context))
            for n in drafts:
                add(batch, context, n, "drafter_decode", truth.draft_seconds("w4a16", batch, context, n))
                add(batch, context, n, "target_verify", truth.verify_seconds(batch, context, n))
    return rows


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(), lambda options, arguments: 7)
    options = parser.parse_args(["calibrate", *arguments])
    return int(options.run(options, list(arguments)))
