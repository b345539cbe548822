"""Format `auto`: measures time and acceptance of each format on each part of this policy, on this device, and chooses.

A unit is one kind of linear layer in one third of the model's depth. For every unit and format a drafter is built in which only
that unit is quantised; its acceptance is the mean of sum(min(p, q)) over the positions of a few sequences of the last rollout,
read by both target and drafter. speculation/format_choice.py combines the units.
"""

import itertools
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from erollout.drafter.activation_statistics import InputStatistics
from erollout.drafter.drafter import Drafter, target_linears, tensor_name
from erollout.engine.model.decode_model import DecodeModel
from erollout.engine.model.linear import Linear
from erollout.engine.model.model_runner import ModelRunner
from erollout.engine.sampling.logits import gather, shard_logits
from erollout.policy.decoder import LAYER, Layer
from erollout.speculation.format_choice import Choice, Selection, select

logger = logging.getLogger(__name__)

CANDIDATES = ("w4a16_clip", "w8a8")
"""Candidate formats besides `none`."""
PARTS = 3
"""Number of parts of the model's depth with separate choices."""
CONFIGURED = "as configured"
"""Name of the unit, with a single choice, of layers whose format is configured."""
_ROUNDS = 9

Overrides = list[tuple[str, str]]
MakeDrafter = Callable[[Overrides], Drafter]
"""Builds a drafter with the target's layers except for these (layer, format)."""


@torch.inference_mode()
def select_formats(
    target: DecodeModel,
    make_drafter: MakeDrafter,
    token_sequences: Sequence[Sequence[int]],
    input_statistics: Mapping[str, InputStatistics],
    configured: Sequence[str] = (),
    make_configured: Callable[[], Drafter] | None = None,
) -> tuple[Overrides, Selection]:
    """The formats with the highest predicted speed-up, as overrides per layer, and the prediction.

    Collective over the replica, with equal sequences on its ranks. Times are each rank's own, so the ranks must agree on one of
    the results afterwards. The target's cache must be allocated, and is overwritten.

    Args:
        token_sequences: at least one of at least two tokens; each fits the cache.
        configured: layers whose format is configured, possibly including the LM head.
        make_configured: builds a drafter in which only these are quantised, as configured; needed only with `configured`.
    """
    target.prepare()
    expected = [probabilities(target, tokens) for tokens in token_sequences]
    own = target_linears(target)
    choices: dict[str, list[Choice]] = {}

    def measured(drafter: Drafter, layers: Sequence[str], format: str) -> Choice:
        drafter.use_statistics(input_statistics)
        for name in target.tensors:
            drafter.requantize_(name)
        drafter.model.prepare()
        linears = [drafter.linears.get(layer, own[layer]) for layer in layers]
        rate = acceptance(expected, drafter.model, token_sequences)
        return Choice(format, _seconds(linears, layers, target), rate)

    everything = layers_by_unit(target.architecture.num_layers, target.architecture.layer)
    free = {unit: [layer for layer in layers if layer not in configured] for unit, layers in everything.items()}
    units = {unit: layers for unit, layers in free.items() if layers}
    targets = {unit: _seconds([own[layer] for layer in layers], layers, target) for unit, layers in units.items()}
    for unit, layers in units.items():
        choices[unit] = [Choice("none", targets[unit], 1.0)]
        choices[unit] += [measured(make_drafter([(layer, f) for layer in layers]), layers, f) for f in CANDIDATES]
    step = _step_seconds(target, token_sequences[0])
    other = step - sum(targets.values())
    if configured:
        assert make_configured is not None
        choices[CONFIGURED] = [measured(make_configured(), configured, CONFIGURED)]
        other -= _seconds([own[layer] for layer in configured], configured, target)
    selection = select(choices, max(0.0, other), step)
    for unit, format in selection.formats.items():
        logger.info("drafter %s: %s of %s", unit, format, ", ".join(map(_describe, choices[unit])))
    return [(layer, selection.formats[unit]) for unit, layers in units.items() for layer in layers], selection


def layers_by_unit(num_layers: int, layer: Layer = LAYER) -> dict[str, list[str]]:
    """Local names of the linear layers of each unit, by kind and by part of the depth."""
    bounds = sorted({num_layers * part // PARTS for part in range(PARTS + 1)})
    parts = list(itertools.pairwise(bounds))
    return {
        f"{module.decode} of layers {start}-{end - 1}": [f"layers.{i}.{module.decode}" for i in range(start, end)]
        for module in layer
        if module.is_linear
        for start, end in parts
    }


def acceptance(expected: list[Tensor], model: DecodeModel, token_sequences: Sequence[Sequence[int]]) -> float:
    """Probability that a draft token is accepted: mean over all positions of sum(min(p, q))."""
    totals = [
        gather(torch.minimum(p, probabilities(model, tokens)).double().sum(), model.group).sum()
        for p, tokens in zip(expected, token_sequences, strict=True)
    ]
    positions = sum(len(p) for p in expected)
    return min(1.0, max(1e-6, float(torch.stack(totals).sum()) / positions))


def probabilities(model: DecodeModel, tokens: Sequence[int]) -> Tensor:
    """Probabilities of the next token after every token of a sequence: this rank's columns, float32 [tokens, W]."""
    logits = model.forward(ModelRunner(model).reading(tokens))
    shard = shard_logits(logits, model.architecture.vocab_size, model.vocab_start, model.group)
    return shard.logprobs().exp_()


def _step_seconds(model: DecodeModel, tokens: Sequence[int]) -> float:
    """Seconds of a decode step of one sequence with these tokens."""
    runner = ModelRunner(model)
    return _median_seconds(lambda: model.forward(runner.reading(tokens, len(tokens) - 1)), model.cache.device)


def _seconds(linears: Sequence[Linear], layers: Sequence[str], model: DecodeModel) -> float:
    """Seconds of one call of each layer with the rows of a step of one sequence."""
    device = model.cache.device
    sizes = [model.tensors[tensor_name(model, layer)].shape[1] for layer in layers]
    inputs = [torch.randn(1, size, device=device).to(model.dtype) for size in sizes]

    def call() -> None:
        for linear, x in zip(linears, inputs, strict=True):
            linear(x)

    return _median_seconds(call, device)


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_ROUNDS):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _describe(choice: Choice) -> str:
    return f"{choice.format} ({choice.seconds * 1e3:.3f} ms, {choice.acceptance:.4f})"
