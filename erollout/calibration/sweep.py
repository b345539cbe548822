"""Sweep: single steps of the real engine, timed at chosen batches, contexts and draft lengths.

All arms take turns, step by step, over the same sequences, so that a busy machine distorts them alike. Times are those of whole
steps, host work included, as the toggle will see them. Only prefill is skipped: the last token of each prompt goes through the
model, and noise replaces the keys and values of the others, which take as long to attend to.

Under tensor parallelism every rank of the replica makes the same calls with the same arguments. Its first rank makes the
decisions that depend on a clock.
"""

import logging
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from erollout.calibration.file import Identity
from erollout.calibration.grid import LEAST_REPETITIONS, SweepGrid, SweepPoint, coarse_to_fine, repetitions
from erollout.calibration.model_size import describe_shape
from erollout.calibration.sweep_file import Mode, SweepRow
from erollout.engine.engine import Engine
from erollout.engine.model.decode_model import DecodeModel
from erollout.engine.model.model_runner import ModelRunner
from erollout.engine.orders import Orders
from erollout.engine.proposers.base import DraftRequest, Drafts, Proposer
from erollout.engine.scheduler import Batch
from erollout.errors import UserError
from erollout.parallel.groups import device_name
from erollout.speculation.step import OFF, Arm, Load, StepOutcome
from erollout.types import PartialRollout, RolloutRequest, SamplingParams

logger = logging.getLogger(__name__)

_Key = tuple[object, ...]

LEAST_GROWTH = 32
"""Growth of contexts allowed during a run, in tokens; a quarter of the context if that is more."""
BOOTSTRAP_TOKENS = 128
"""Longest verify pass that a bootstrap measures: the cost of longer ones is extrapolated."""


def sweep(
    engine: Engine,
    formats: Sequence[str],
    grid: SweepGrid,
    seconds: float,
    rows_done: Sequence[SweepRow] = (),
    on_row: Callable[[SweepRow], None] = lambda row: None,
    model: str = "",
) -> list[SweepRow]:
    """Time a grid of steps within a budget. The engine is awake and idle, with weights and drafters of one version.

    Args:
        formats: names of engine.proposers.
        rows_done: rows of an earlier sweep of the same grid: points with all of their rows are skipped.
        on_row: called with each new row, all rows of a point together.
        model: name of the model, for the reader.

    Returns: the new rows. Points that the engine can't hold, or that exceed the budget, have none.
    Raises UserError for rows_done of another engine or device.
    """
    arms = [Arm(format, n) for format in formats for n in grid.num_speculative_tokens]
    measurement = _Sweep(engine, arms, engine.rollout.max_num_batched_tokens, model)
    measurement.require_same(rows_done)
    return measurement.rows(grid.places(), seconds, {_key(row) for row in rows_done}, on_row)


def bootstrap(
    engine: Engine, formats: Sequence[str], max_num_seqs: int, drafts: Sequence[int], seconds: float
) -> list[SweepRow]:
    """A short sweep for runs without a calibration: batches 1, 2, 4, ... at a rollout's usual context, and at a short one if
    there is time, in coarse to fine order. As `sweep` otherwise.

    Args:
        max_num_seqs: largest batch of a replica.
        drafts: values of num_speculative_tokens that may be chosen later; up to three of them are measured.
    """
    longest = min(engine.max_model_len, engine.rollout.max_prompt_tokens + engine.rollout.max_tokens)
    batches = coarse_to_fine((max_num_seqs, *(2**i for i in range(max_num_seqs.bit_length()))))
    few = sorted({min(drafts), max(drafts), min(drafts, key=lambda n: abs(n - 3))})
    arms = [Arm(format, n) for format in formats for n in few]
    usual = min(longest // 2, longest - _response_tokens((*arms, OFF, OFF)))
    places = [SweepPoint(batch, max(2, context)) for context in (usual, usual // 4) for batch in batches]
    measurement = _Sweep(engine, arms, BOOTSTRAP_TOKENS, "")
    return measurement.rows_in_rounds(places, seconds)


def identify(engine: Engine, formats: Sequence[str]) -> Identity:
    """Identity that this engine's times hold for."""
    rollout = engine.rollout
    return Identity(
        describe_shape(engine.architecture),
        hardware_name(engine.cache.device),
        rollout.tensor_model_parallel_size,
        tuple(formats),
        rollout.dtype,
        engine.kernel,
    )


def hardware_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU with the number of threads per rank."""
    if device.type == "cuda":
        return device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


class _Sweep:
    """Measurements of one replica, point by point."""

    def __init__(self, engine: Engine, arms: Sequence[Arm], most_tokens: int, model: str) -> None:
        """`most_tokens`: longest verify pass to measure."""
        self.engine = engine
        self.arms = tuple(arms)
        self.most_tokens = min(most_tokens, engine.rollout.max_num_batched_tokens)
        self.identity = identify(engine, tuple(dict.fromkeys(arm.format for arm in arms)))
        self.model = model
        self._cost_per_weight = 0.0
        """Seconds per weight of one repetition at the previous point; 0 at the first."""

    def rows(
        self, places: Sequence[SweepPoint], seconds: float, done: Set[_Key], on_row: Callable[[SweepRow], None]
    ) -> list[SweepRow]:
        """Measure the points that are not done, as far as the budget allows, and at least one."""
        rows: list[SweepRow] = []
        began = time.perf_counter()
        missing = [place for place in places if not self._keys(place) <= done]
        with _measuring(self.engine) as stopwatch:
            for place, samples in self._visits(missing, seconds, LEAST_REPETITIONS, stopwatch):
                new = [row for row in self._rows(place, samples) if _key(row) not in done]
                for row in new:
                    on_row(row)
                rows += new
                self._log(place, samples, seconds - (time.perf_counter() - began))
        return rows

    def rows_in_rounds(self, places: Sequence[SweepPoint], seconds: float) -> list[SweepRow]:
        """As `rows`, but visit each point LEAST_REPETITIONS times, so that a busy second does not harm a single point."""
        taken: dict[SweepPoint, list[_Sample]] = {}
        with _measuring(self.engine) as stopwatch:
            for place, samples in self._visits(LEAST_REPETITIONS * list(places), seconds, 1, stopwatch):
                taken.setdefault(place, []).extend(samples)
        return [row for place, samples in taken.items() for row in self._rows(place, samples)]

    def _visits(
        self, places: Sequence[SweepPoint], seconds: float, least: int, stopwatch: "_Stopwatch"
    ) -> Iterator[tuple[SweepPoint, list["_Sample"]]]:
        """SweepPoint by place what was measured there, within the budget. `least`: repetitions at each, where there is time."""
        places = [place for place in places if self._fits(place)]
        if places:
            self._take(places[0], self._arms_at(places[0]), stopwatch)  # allocates and prepares, outside the budget
        deadline = time.perf_counter() + seconds
        for index, place in enumerate(places):
            left = self._agreed(deadline - time.perf_counter())
            if self._cost_per_weight and left < self._cost_per_weight * place.weight:
                continue
            share = left * place.weight / sum(p.weight for p in places[index:])
            samples = self._measure(place, share, left, least, stopwatch)
            yield place, samples

    def require_same(self, rows: Iterable[SweepRow]) -> None:
        """Raise UserError unless all rows were measured with this engine and device."""
        mine = self._row(SweepPoint(1, 1), OFF, "target_decode", [1.0])
        for row in rows:
            for name in ("hardware", "tensor_model_parallel_size", "architecture", "dtype", "kernels"):
                if getattr(row, name) != getattr(mine, name):
                    raise UserError(
                        f"the existing sweep has {name} {getattr(row, name)!r}, this engine has {getattr(mine, name)!r}; "
                        "name another file, or delete it"
                    )

    def _arms_at(self, place: SweepPoint) -> tuple[Arm, ...]:
        """Arms in the order of one repetition, which ends with two steps without drafts, of which the first follows drafts."""
        return *(arm for arm in self.arms if place.batch * (1 + arm.num_speculative_tokens) <= self.most_tokens), OFF, OFF

    def _fits(self, place: SweepPoint) -> bool:
        """Whether the engine can hold a point's sequences for one repetition."""
        end = _prompt_tokens(place) + _response_tokens(self._arms_at(place))
        return place.batch <= self.engine.rollout.max_num_seqs and end <= self._room(place)

    def _room(self, place: SweepPoint) -> int:
        """Number of tokens that each sequence may have."""
        cache = self.engine.cache
        return min(self.engine.max_model_len, cache.num_blocks // place.batch * cache.block_size)

    def _at_once(self, place: SweepPoint) -> int:
        """Number of repetitions in one run before the contexts have grown too much."""
        growth = min(_growth(place.context), self._room(place) - _prompt_tokens(place) - _response_tokens(()))
        return max(1, growth // _most_emitted(self._arms_at(place)))

    def _measure(self, place: SweepPoint, share: float, left: float, least: int, stopwatch: "_Stopwatch") -> list["_Sample"]:
        """Repeat all arms at a point, for its share of the remaining seconds."""
        arms = self._arms_at(place)
        if stopwatch.on_device:
            self._take(place, arms, stopwatch)  # compiles kernels for these shapes
        began = time.perf_counter()
        samples = self._take(place, arms, stopwatch)
        once = self._agreed(time.perf_counter() - began)
        self._cost_per_weight = once / place.weight
        remaining = repetitions(share, left, once, least) - 1
        while remaining > 0:
            times = min(remaining, self._at_once(place))
            samples += self._take(place, times * arms, stopwatch)
            remaining -= times
        return samples

    def _take(self, place: SweepPoint, arms: tuple[Arm, ...], stopwatch: "_Stopwatch") -> list["_Sample"]:
        """Take one step with each of these arms."""
        control = _Turns(arms, place.batch, stopwatch)
        self.engine.run(control, requests=_requests(self.engine, place, _response_tokens(arms)))
        return control.samples

    def _rows(self, place: SweepPoint, samples: Sequence["_Sample"]) -> list[SweepRow]:
        """Rows of a point from its samples, in the order of whole repetitions."""
        arms = self._arms_at(place)
        *drafting, after, plain = (samples[index :: len(arms)] for index in range(len(arms)))
        rows = [self._row(place, OFF, "target_decode", [s.seconds for s in plain])]
        for arm, of_arm in zip(arms, drafting, strict=False):
            n = arm.num_speculative_tokens
            rows.append(self._row(place, arm, "drafter_decode", [s.drafting / n for s in of_arm]))
            rows.append(self._row(place, arm, "target_verify", [s.seconds - s.drafting for s in of_arm]))
        if drafting:
            rows.append(self._row(place, arms[-3], "target_decode_sd", [s.seconds for s in after]))
        return rows

    def _row(self, place: SweepPoint, arm: Arm, mode: Mode, seconds: Sequence[float]) -> SweepRow:
        ms = [1e3 * value for value in seconds]
        mean, median, deviation = statistics.mean(ms), statistics.median(ms), statistics.pstdev(ms)
        return SweepRow(
            model=self.model,
            batch=place.batch,
            seq=place.context,
            gamma=arm.num_speculative_tokens,
            mode=mode,
            mean_ms=round(mean, 4),
            median_ms=round(median, 4),
            std_ms=round(deviation, 4),
            min_ms=round(min(ms), 4),
            max_ms=round(max(ms), 4),
            n_samples=len(ms),
            format=arm.format,
            hardware=self.identity.hardware,
            tensor_model_parallel_size=self.identity.tensor_model_parallel_size,
            architecture=self.identity.model,
            dtype=self.identity.dtype,
            kernels=self.identity.kernels,
        )

    def _keys(self, place: SweepPoint) -> set[_Key]:
        """Keys of all rows of a point."""
        return {_key(row) for row in self._rows(place, [_Sample(OFF, 1.0, 0.0)] * len(self._arms_at(place)))}

    def _agreed(self, value: float) -> float:
        """The value of the replica's first rank."""
        group = self.engine.model.group
        if group is None:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.engine.cache.device)
        dist.broadcast(tensor, group=group, group_src=0)
        return float(tensor.item())

    def _log(self, place: SweepPoint, samples: Sequence["_Sample"], left: float) -> None:
        seconds: dict[Arm, list[float]] = {}
        for sample in samples:
            seconds.setdefault(sample.arm, []).append(sample.seconds)
        figures = ", ".join(f"{arm} {1e3 * statistics.median(of_arm):.1f} ms" for arm, of_arm in seconds.items())
        logger.info(
            "batch %d, context %d, %d times: %s; at most %.0f s left",
            *(place.batch, place.context, len(samples) // len(self._arms_at(place)), figures, max(0.0, left)),
        )


@dataclass(frozen=True, slots=True)
class _Sample:
    """Times of one step."""

    arm: Arm
    seconds: float
    drafting: float
    """Seconds spent drafting."""


class _Turns:
    """A Control that runs given steps over a point's sequences once all of them decode, and then drops them."""

    def __init__(self, arms: Sequence[Arm], batch: int, stopwatch: "_Stopwatch") -> None:
        self.arms = arms
        self.batch = batch
        self.stopwatch = stopwatch
        self.samples: list[_Sample] = []
        self._turn = -1

    def orders(self, load: Load) -> Orders:
        if load.prefill_tokens or load.decoding < self.batch:
            return Orders(is_last=True)
        self._turn += 1
        if self._turn == len(self.arms):
            return Orders(release=self.batch, is_last=True)
        return Orders(self.arms[self._turn], is_last=True)

    def released(self, partials: list[PartialRollout]) -> None:
        pass

    def observe(self, outcome: StepOutcome) -> None:
        if self._turn < 0:
            return
        arm, load = self.arms[self._turn], outcome.load
        assert load.decoding == self.batch and not load.prefill_tokens, "the decoding sequences are not those of the point"
        assert sum(outcome.drafted_at) == self.batch * arm.num_speculative_tokens, "drafts were cut"
        drafting = self.stopwatch.seconds(outcome) if arm.speculates else 0.0
        self.samples.append(_Sample(arm, outcome.seconds, drafting))


class _Stopwatch:
    """Timer of a step's drafting: the host's clock if it waits for the drafts, CUDA events on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.on_device = device.type == "cuda"
        if self.on_device:
            self.began = torch.cuda.Event(enable_timing=True)
            self.ended = torch.cuda.Event(enable_timing=True)

    def seconds(self, outcome: StepOutcome) -> float:
        """Drafting seconds of the step that just ended, whose tokens are on the host."""
        return self.began.elapsed_time(self.ended) / 1e3 if self.on_device else outcome.seconds_drafting


class _Watched:
    """A proposer whose steps all have the drafts asked: what it lacks is made up, because a pass takes as long for any token.

    On CUDA it works between two device events. The previous step ended with its tokens on the host, so the first event passes
    at once, and the time between the two is the whole time of drafting, host and device."""

    def __init__(self, proposer: Proposer, stopwatch: _Stopwatch) -> None:
        self.proposer = proposer
        self.stopwatch = stopwatch

    def require(self, policy_version: int) -> None:
        self.proposer.require(policy_version)

    def propose(self, request: DraftRequest) -> Drafts:
        if self.stopwatch.on_device:
            self.stopwatch.began.record()
        drafts = self.proposer.propose(request)
        if self.stopwatch.on_device:
            self.stopwatch.ended.record()
        return drafts if drafts.num_drafts is None else replace(drafts, num_drafts=None)

    def sleep(self) -> None:
        self.proposer.sleep()


class _NoiseForPrompts(ModelRunner):
    """A decode model that computes only the last token of a prompt's pass."""

    def __init__(self, model: DecodeModel) -> None:
        super().__init__(model)
        block = self.cache.layer(0)[:, :1]
        generator = torch.Generator(block.device).manual_seed(0)
        self.noise = torch.randn(block.shape, device=block.device, generator=generator).to(block.dtype)

    def run(self, batch: Batch, draft_ids: Tensor | None = None) -> Tensor:
        if prompts := [item for item in batch.scheduled if item.num_tokens > 1]:
            blocks = [block for item in prompts for block in item.sequence.block_table]
            for layer in range(self.model.architecture.num_layers):
                self.cache.layer(layer)[:, blocks] = self.noise
            batch = Batch([replace(item, start=item.end - 1, num_tokens=1) for item in batch.scheduled])
        return super().run(batch, draft_ids)


@contextmanager
def _measuring(engine: Engine) -> Iterator[_Stopwatch]:
    """Context in which the engine has timed drafters and cheap prompts, any number of which fit one pass."""
    stopwatch = _Stopwatch(engine.cache.device)
    rollout, runner, proposers = engine.rollout, engine.runner, engine.proposers
    tokens = rollout.max_num_seqs * engine.max_model_len
    engine.rollout = replace(rollout, max_num_batched_tokens=tokens)  # type: ignore[type-var]  # as in Config.to_dict
    engine.runner = _NoiseForPrompts(engine.model)
    engine.proposers = {name: _Watched(proposer, stopwatch) for name, proposer in proposers.items()}
    try:
        yield stopwatch
    finally:
        engine.rollout, engine.runner, engine.proposers = rollout, runner, proposers


def _requests(engine: Engine, place: SweepPoint, response_tokens: int) -> list[RolloutRequest]:
    """One request per sequence of a point, so that each has its own keys and values, with the run's sampling parameters:
    filters cost time."""
    rollout = engine.rollout
    sampling = SamplingParams(
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        repetition_penalty=rollout.repetition_penalty,
        max_tokens=response_tokens,
        ignore_eos=True,
    )
    generator = torch.Generator().manual_seed(0)
    prompt = tuple(torch.randint(engine.architecture.vocab_size, (_prompt_tokens(place),), generator=generator).tolist())
    return [RolloutRequest(index, prompt, 1, sampling, index) for index in range(place.batch)]


def _growth(context: int) -> int:
    """Growth of contexts allowed in one run, in tokens."""
    return max(LEAST_GROWTH, context // 4)


def _prompt_tokens(place: SweepPoint) -> int:
    return max(2, place.context - _growth(place.context) // 4)


def _response_tokens(arms: Sequence[Arm]) -> int:
    """Response length at which no step with these arms has its drafts cut: prefill emits one, and one must follow drafts."""
    return _most_emitted(arms) + 2


def _most_emitted(arms: Sequence[Arm]) -> int:
    return sum(1 + arm.num_speculative_tokens for arm in arms)


def _key(row: SweepRow) -> _Key:
    return (row.batch, row.seq, row.gamma, row.mode, row.format)
