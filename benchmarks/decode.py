"""Decode throughput of the engine beside its peers and the memory-bandwidth limit: SmolLM2-135M, bf16, one thread.

    python benchmarks/decode.py            # needs the `benchmark` extra; fetches the model on first use

The peers are transformers' generate and, where openvino-genai is installed and has a model, OpenVINO's continuous batching.
All arms run in one process in rotated order; the figures are medians over the rounds. Times are CPU seconds of the process,
all its threads together, so that other processes on the machine distort them less; the ratio by wall clock stands beside them.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from smollm2 import ANSWER, QUESTION, openvino_directory
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, logging

from erollout.config import RolloutConfig
from erollout.data.smollm2 import model_directory
from erollout.doctor.cpu import processor
from erollout.engine.engine import Engine
from erollout.engine.model.decode_layout import decode_placement
from erollout.engine.model.linear import Linear
from erollout.engine.model.native_model import NativeModel
from erollout.parallel.placement import box_slices
from erollout.policy.families import read_architecture
from erollout.types import RolloutRequest, SamplingParams

PROMPT_TOKENS = 32
Arm = Callable[[Tensor, list[int]], None]
"""Generates a response of each given length to each row of the prompts [n, PROMPT_TOKENS]."""


def build_engine(directory: Path, max_num_seqs: int) -> Engine:
    architecture = read_architecture(json.loads((directory / "config.json").read_text()), str(directory))
    rollout = RolloutConfig(dtype="bfloat16", max_num_seqs=max_num_seqs)
    engine = Engine(architecture, rollout, None, torch.device("cpu"), None, max_model_len=1024)
    weights = load_file(directory / "model.safetensors")
    for local in decode_placement(architecture, 1, 0):
        for piece in local.pieces:
            source = weights[piece.tensor][box_slices(piece.start, piece.shape)]
            engine.local_tensors()[local.name][box_slices(piece.local_start, piece.shape)].copy_(source)
    engine.weights_updated(0)
    return engine


@dataclass(frozen=True, slots=True)
class Seconds:
    cpu: float
    wall: float


def timed(function: Callable[[], object]) -> Seconds:
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def make_prompts(count: int) -> Tensor:
    return torch.randint(100, 40_000, (count, PROMPT_TOKENS), generator=torch.Generator().manual_seed(count))


def run_engine(engine: Engine, prompts: Tensor, lengths: list[int]) -> None:
    """Each prompt its own request: no prompt is shared."""
    requests = [
        RolloutRequest(i, tuple(ids), 1, SamplingParams(max_tokens=length, ignore_eos=True), seed=i)
        for i, (ids, length) in enumerate(zip(prompts.tolist(), lengths, strict=True))
    ]
    rollouts = engine.generate(requests)
    assert [len(rollout.response_ids) for rollout in rollouts] == lengths


@torch.inference_mode()
def run_transformers(model: PreTrainedModel, at_once: int, prompts: Tensor, lengths: list[int]) -> None:
    """Static batches in order of arrival, each as long as its longest response; equal prompt lengths, so nothing is padded."""
    for start in range(0, len(lengths), at_once):
        rows, length = prompts[start : start + at_once], max(lengths[start : start + at_once])
        output = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
        )
        assert output.shape[1] == rows.shape[1] + length


def build_openvino(directory: Path, max_num_seqs: int) -> Any:
    """OpenVINO GenAI's ContinuousBatchingPipeline in bf16 on one thread. Its KV cache is bf16 like the others': the default
    of 8 bits is no faster here. Prompts are never cached, since every round repeats them."""
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = max_num_seqs
    scheduler.max_num_batched_tokens = max_num_seqs * PROMPT_TOKENS
    scheduler.cache_size = 1  # GB
    scheduler.enable_prefix_caching = False
    properties = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "bf16",
        "KV_CACHE_PRECISION": "bf16",
        "ENABLE_CPU_PINNING": False,
    }
    return openvino_genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", properties)


def run_openvino(pipeline: Any, prompts: Tensor, lengths: list[int]) -> None:
    import openvino
    import openvino_genai

    def config(index: int, length: int) -> Any:
        return openvino_genai.GenerationConfig(
            max_new_tokens=length, ignore_eos=True, do_sample=True, temperature=1.0, rng_seed=index
        )

    inputs = [openvino.Tensor(row[None].numpy()) for row in prompts]
    results = pipeline.generate(inputs, [config(i, length) for i, length in enumerate(lengths)])
    assert [len(result.m_generation_ids[0]) for result in results] == lengths


def build_arms(directory: Path, model: PreTrainedModel, openvino: Path | None, at_once: int) -> dict[str, Arm]:
    """The engine first; every arm runs at most `at_once` sequences together."""
    arms: dict[str, Arm] = {
        "engine": partial(run_engine, build_engine(directory, at_once)),
        "transformers": partial(run_transformers, model, at_once),
    }
    if openvino is not None:
        arms["OpenVINO"] = partial(run_openvino, build_openvino(openvino, at_once))
    return arms


def ragged_lengths() -> list[int]:
    """32 response lengths: lognormal with median 48 and sigma 1, clipped to 8..512."""
    lengths = np.random.default_rng(0).lognormal(math.log(48), 1.0, 32)
    return [min(512, max(8, round(length))) for length in lengths.tolist()]


def read_bandwidth(num_bytes: int) -> float:
    """Bytes per second of one thread that sums as many bytes as the weights have: the median of 15 passes."""
    data = torch.ones(num_bytes // 4)
    return num_bytes / statistics.median(timed(data.sum).cpu for _ in range(15))


class Stopwatch:
    """CPU seconds spent in wrapped callables."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            result = function(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.thread_time() - start
            return result

        return wrapped


class TimedLinear:
    """A linear layer under a stopwatch."""

    def __init__(self, linear: Linear, watch: Stopwatch) -> None:
        self._linear = linear
        self._run = watch.wrap("linears", linear)

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x)

    def prepare(self) -> None:
        self._linear.prepare()

    def release(self) -> None:
        self._linear.release()


def watch_parts(model: Any, watch: Stopwatch) -> None:
    """Put a torch model's linear layers and attention under a stopwatch."""
    for layer in model.layers:
        layer.linears = {name: TimedLinear(linear, watch) for name, linear in layer.linears.items()}
    model.lm_head = TimedLinear(model.lm_head, watch)
    model.attention.plan = watch.wrap("plan", model.attention.plan)
    attention = watch.wrap("attention", model.attention.__call__)
    model.attention = type("Timed", (), {"__call__": staticmethod(attention), "plan": staticmethod(model.attention.plan)})()


def step_breakdown(directory: Path, sequences: int, tokens: int) -> dict[str, float]:
    """Milliseconds of one decode step by part, from an engine of its own. The native model is one call: one part."""
    engine, watch = build_engine(directory, sequences), Stopwatch()
    run_engine(engine, make_prompts(sequences), [4] * sequences)
    model: Any = engine.model
    native = isinstance(model, NativeModel)
    if not native:
        watch_parts(model, watch)
    model.forward = watch.wrap("forward", model.forward)
    sampler: Any = engine.sampler
    sampler.sample = watch.wrap("sampling", sampler.sample)

    def total(count: int) -> dict[str, float]:
        watch.seconds.clear()
        seconds = timed(lambda: run_engine(engine, make_prompts(sequences), [count] * sequences)).cpu
        return {**watch.seconds, "total": seconds}

    short, long = total(4), total(4 + tokens)
    step = {name: (long[name] - short[name]) / tokens * 1e3 for name in long}
    parts = {"model": step["forward"]} if native else {
        "linears": step["linears"],
        "attention": step["attention"],
        "norms, rotation, KV write, residuals": step["forward"] - step["linears"] - step["attention"],
    }  # fmt: skip
    return {
        **parts,
        "sampling": step["sampling"],
        "Python: scheduling, input tensors": step["total"] - step["forward"] - step["sampling"],
        "step": step["total"],
    }


@dataclass(slots=True)
class Case:
    """Times of all arms at the same work."""

    name: str
    lengths: list[int]
    bandwidth_limit: str = ""
    """Tokens per second, where one limit holds for the whole case."""
    times: dict[str, list[Seconds]] = field(default_factory=dict)

    def run(self, arms: dict[str, Arm], rounds: int) -> None:
        """All arms in turn, beginning with another one each round; each first warms up on these prompts."""
        prompts = make_prompts(len(self.lengths))
        for arm in arms.values():
            arm(prompts, [4] * len(self.lengths))
        self.times = {name: [] for name in arms}
        names = list(arms)
        for index in range(rounds):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                self.times[name].append(timed(partial(arms[name], prompts, self.lengths)))
        print(self.row(), flush=True)

    def row(self) -> str:
        speeds = [f"{sum(self.lengths) / statistics.median(s.cpu for s in times):.1f}" for times in self.times.values()]
        ratios = [cell for name in list(self.times)[1:] for cell in self._ratios(name)]
        return "| " + " | ".join([self.name, *speeds, *ratios, self.bandwidth_limit]) + " |"

    def _ratios(self, peer: str) -> list[str]:
        """How many times faster the engine is than the peer: by CPU time with the range over the rounds, and by wall clock."""
        pairs = list(zip(self.times["engine"], self.times[peer], strict=True))
        cpu = sorted(theirs.cpu / ours.cpu for ours, theirs in pairs)
        wall = statistics.median(theirs.wall / ours.wall for ours, theirs in pairs)
        return [f"{statistics.median(cpu):.2f} ({cpu[0]:.2f}-{cpu[-1]:.2f})", f"{wall:.2f}"]


def header(arms: list[str]) -> list[str]:
    ratios = [title for peer in arms[1:] for title in (f"engine / {peer} (range)", "by wall clock")]
    titles = ["sequences", *(f"{arm}, tokens/s" for arm in arms), *ratios, "bandwidth limit, tokens/s"]
    return ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]


def check_model(engine: Engine) -> None:
    """The converted weights know the capital of France."""
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    (rollout,) = engine.generate([RolloutRequest(0, QUESTION, 1, greedy, seed=0)])
    assert ANSWER in rollout.response_ids, f"the greedy completion does not name Paris: {rollout.response_ids}"


def report(options: argparse.Namespace) -> list[str]:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    directory = model_directory()
    openvino, note = find_openvino(options.openvino_model, directory)
    print(note, flush=True)
    engine = build_engine(directory, 1)
    check_model(engine)
    weight_bytes = sum(t.numel() * t.element_size() for t in engine.local_tensors().values())
    bandwidth = read_bandwidth(weight_bytes)
    read = f"Weights: {weight_bytes / 1e6:.0f} MB, read at {bandwidth / 1e9:.1f} GB/s. Kernels: {engine.kernel}. {note}"
    cases = table(options, directory, openvino, bandwidth / weight_bytes)
    lines = [*machine(), read, "", *header(list(cases[0].times)), *(case.row() for case in cases), ""]
    for size in sorted({1, max(options.batches)}):
        lines += breakdown_lines(step_breakdown(directory, size, options.tokens), size, weight_bytes / bandwidth * 1e3)
    return lines


def table(options: argparse.Namespace, directory: Path, openvino: Path | None, steps_per_second: float) -> list[Case]:
    """All cases, measured. steps_per_second: how often the bandwidth allows the weights to be read."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    arms = build_arms(directory, model, openvino, max(options.batches))
    cases = [Case(str(n), [options.tokens] * n, f"{n * steps_per_second:.0f}") for n in options.batches]
    for case in cases:
        case.run(arms, options.rounds)
    if options.ragged_rounds:
        lengths = ragged_lengths()
        cases.append(Case(f"ragged: {len(lengths)} requests, {sum(lengths)} tokens, 16 at once", lengths))
        cases[-1].run(build_arms(directory, model, openvino, 16), options.ragged_rounds)
    return cases


def find_openvino(given: Path | None, source: Path) -> tuple[Path | None, str]:
    """(OpenVINO's model directory or None, what the report says about it). A directory that was asked for must be usable."""
    if importlib.util.find_spec("openvino_genai") is None:
        if given is not None:
            raise SystemExit("--openvino-model needs the package openvino-genai, which is not installed")
        return None, "OpenVINO GenAI: not installed, not measured."
    version = f"OpenVINO GenAI {importlib.metadata.version('openvino-genai')}"
    if given is not None and not (given / "openvino_model.xml").exists():
        raise SystemExit(f"--openvino-model {given}: no openvino_model.xml there; export the model with optimum-intel")
    directory = given or openvino_directory(source)
    if directory is None:
        return None, f"{version}: no model, not measured; pass --openvino-model or install optimum-intel to export one."
    return directory, f"{version}: continuous batching, bf16 weights and KV cache."


def breakdown_lines(step: dict[str, float], sequences: int, limit_ms: float) -> list[str]:
    lines = [
        f"One step of {sequences} sequence(s): the bandwidth limit is {limit_ms:.1f} ms.",
        "",
        "| part | ms | share |",
        "|---|---|---|",
    ]
    return lines + [f"| {name} | {ms:.2f} | {ms / step['step']:.0%} |" for name, ms in step.items()] + [""]


def machine() -> list[str]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    isa = torch.backends.cpu.get_cpu_capability()
    return [
        f"Machine: {processor()[1]}, {torch.get_num_threads()} thread, {isa}. Python {platform.python_version()}, {versions}."
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=lambda text: [int(x) for x in text.split(",")], default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=40, help="response length of every sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ragged-rounds", type=int, default=2)
    parser.add_argument(
        "--openvino-model", type=Path, help="an OpenVINO GenAI model directory; default: export one if possible"
    )
    options = parser.parse_args()
    start = time.perf_counter()
    lines = report(options)
    print("\n" + "\n".join(lines) + f"\nElapsed: {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
