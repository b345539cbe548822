"""Digests of short runs: what they sample, learn and save, bit for bit, to show that a change of the code changed none of it.

    python benchmarks/recorded_runs.py --out FILE [--keep DIR]        record
    python benchmarks/recorded_runs.py --compare FILE                 run again and compare: exit status 1 on a difference
    python benchmarks/recorded_runs.py --compare FILE --with OTHER    compare two records
    python benchmarks/recorded_runs.py --compare FILE --resume DIR    resume the stopped runs in DIR, and compare

Every run goes through the command line, and its results are read from the files that it leaves: nothing of the package is
imported, so the script works unchanged on either side of a move. `--keep DIR` leaves two stopped runs for `--resume`, with
their configurations: one of reinforcement learning, in mid-rollout, and a supervised one.

Runs, on a model of 189,000 parameters in 2 to 4 ranks (about four minutes on two cores):

    sft            supervised warm-up, two data-parallel ranks with the distributed optimizer
    pp2            the demo: GRPO on two pipeline stages, bfloat16 rollouts on two replicas, evaluation
    tp2, tp2pp2    the demo on other layouts; tp2pp2 samples in float32
    adaptive       pp2 with adaptive, coupled speculation, stopped in mid-rollout and resumed: equal to pp2
    adaptive-tp2   the same, resumed on two tensor-parallel ranks
    sft-stopped    sft, stopped and resumed: equal to sft
    rejection      always 3 INT4 drafts with rejection: a small Qwen2 from random weights in bfloat16, one rank, KL and entropy,
                   two updates per step
    rollout-bf16   `erollout rollout` of pp2's final policy, coupled INT8 drafts
    rollout-f32    the same without drafts, in float32 with top-k, min-p and a repetition penalty

Adaptive speculation with rejection is left out: its samples depend on when drafts are made, which the clock decides. So do
speeds, decode steps and what the toggle has learnt: they are not recorded where the clock has a part in them. What is kept of
a stopped rollout depends on the moment too; recorded is that each kept response is the beginning of the final one.

Bits are those of one kind of processor with one version of torch: the record names both, and a comparison says where they
differ.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_SECONDS = 900.0
PROMPTS, GROUP, MAX_TOKENS, STEPS, HELD_OUT = 8, 4, 48, 4, 16
STOP_AT = 2 * PROMPTS
"""Prompts from this index on are those of the third step."""
SHOWN_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")

Quantities = dict[str, dict[str, str]]
"""Quantities of a run: quantity -> key (a step, a tensor's name) -> digest or exact value."""
Response = tuple[int, list[int], list[int]]
"""Index and token ids of its prompt, and its own token ids."""

SHORT: dict[str, Any] = {
    "rollout": {
        "prompts_per_step": PROMPTS,
        "group_size": GROUP,
        "max_tokens": MAX_TOKENS,
        "special_tokens": "all",  # the text then tells every token
        "kv_cache_gib": 0.02,
    },
    "rewards": {"timeout_seconds": 100.0},
    "data": {"args": {"max_terms": 6}, "date": "2026-11-30"},
    "train": {"steps": STEPS},
    "evaluation": {"interval": 2, "num_prompts": HELD_OUT},
    "tracking": {"enabled": False},
    "checkpoint": {"interval": 2},
}
SUPERVISED: dict[str, Any] = {
    "data": {"args": {"max_terms": 6}, "date": "2026-11-30"},
    "optimizer": {"lr_warmup_steps": 10, "use_distributed_optimizer": True},
    "supervised": {"steps": 60, "batch_size": 32},
    "tracking": {"enabled": False},
    "checkpoint": {"interval": 1000},  # one at the end
}
ONE_RANK: dict[str, Any] = {"pipeline_model_parallel_size": 1, "world_size": 1}
TWO_TENSOR_RANKS: dict[str, Any] = {"pipeline_model_parallel_size": 1, "tensor_model_parallel_size": 2}
SAMPLING: dict[str, Any] = {
    "model": {"path": "runs/pp2-exported"},
    "parallel": ONE_RANK,
    "rollout": {"max_tokens": MAX_TOKENS, "kv_cache_gib": 0.02},
    "data": SHORT["data"],
    "evaluation": {"num_prompts": HELD_OUT, "samples_per_prompt": 2},
}


def _drafts(mode: str, verification: str, format: str, group_size: int = 16, **others: Any) -> dict[str, Any]:
    drafter = {"format": format, "group_size": group_size, "statistics_interval": 1}
    return {"speculation": {"mode": mode, "verification": verification, "drafter": drafter} | others}


ADAPTIVE = _drafts("adaptive", "coupled", "w8a8", toggle={"bootstrap_seconds": 0.2, "probe_interval": 10})
ADAPTIVE["speculation"]["drafter"]["alternatives"] = ["w4a16_clip"]
ADAPTIVE["rollout"] = {"max_num_seqs": 3}  # it lasts long enough to be stopped in its middle
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
REJECTION: dict[str, Any] = {
    "parallel": ONE_RANK,
    **_drafts("always", "rejection", "w4a16_clip", group_size=32, num_speculative_tokens=3),
    "model": {"path": None, "architecture": QWEN2, "tokenizer": "runs/demo/tokenizer", "dtype": "bfloat16"},
    "rollout": {"temperature": 0.1},  # or INT4 drafts of weights so small are all accepted
    "algorithm": {"kl_coefficient": 0.02, "entropy_coefficient": 0.001},
    "train": {"global_batch_size": PROMPTS * GROUP // 2},
}
FILTERS = {"rollout": {"dtype": "float32", "top_k": 20, "min_p": 0.02, "repetition_penalty": 1.1}}

METRICS = ("train/", "reward/", "response_length/", "mismatch/", "evaluation/", "rollout/tokens", "rollout/truncated_fraction")
UNCLOCKED = (
    "speculation/acceptance",
    "speculation/drafts",
    "speculation/wasted",
    "rollout/decode_steps",
    "rollout/preemptions",
)
"""Further metrics of a run of one rank that always drafts."""
SPEEDS = ("per_second", "seconds", "teraflops")
STATE = ("step", "kind", "identity", "scheduler", "history", "date")
"""Recorded keys of a checkpoint's state.json: not the MLflow run, the configuration (with its paths) and timings."""


@dataclass(frozen=True)
class Run:
    """A command of the package with its configuration, in a folder with all others."""

    name: str
    base: str
    """File in configs/ that `changes` are merged into, one after the other."""
    changes: tuple[dict[str, Any], ...]
    command: str = "train"
    equals: str | None = None
    """Run that this one must be equal to."""
    metrics: tuple[str, ...] = METRICS

    @property
    def output(self) -> str:
        return f"runs/{self.name}"

    @property
    def exported(self) -> str:
        return "runs/demo/warm-start" if self.name == "sft" else f"{self.output}-exported"

    def write(self, folder: Path) -> None:
        """Its configuration, with places from the folder on, and its scorer."""
        tree = _configuration(f"{self.base}.yaml")
        places = {"train": {"output_dir": self.output}, "checkpoint": {"export_path": self.exported}}
        for changes in (*self.changes, places):
            tree = _merged(tree, changes)
        if self.command == "train":  # the others keep the task's own scorer
            tree["rewards"]["function"] = f"{self.name}.py:score"
            shutil.copy(Path(__file__).with_name("recording_scorer.py"), folder / f"{self.name}.py")
        (folder / f"{self.name}.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))

    def arguments(self) -> list[str]:
        arguments = [self.command, "--config", f"{self.name}.yaml"]
        return [*arguments, "--out", f"{self.name}.jsonl"] if self.command == "rollout" else arguments


SFT = Run("sft", "demo-sft", (SUPERVISED,), "sft")
PP2 = Run("pp2", "demo", (SHORT,))
ADAPTIVE_RUN = Run("adaptive", "demo", (SHORT, ADAPTIVE), equals="pp2")
ADAPTIVE_TP2 = Run("adaptive-tp2", "demo", (SHORT, ADAPTIVE, {"parallel": TWO_TENSOR_RANKS}))
SFT_STOPPED = Run("sft-stopped", "demo-sft", (SUPERVISED,), "sft", equals="sft")
RESUMED = (ADAPTIVE_RUN, ADAPTIVE_TP2, SFT_STOPPED)
WHOLE = (
    Run("tp2", "demo-tp2", (SHORT,)),
    Run("tp2pp2", "demo-tp2pp2", (SHORT,)),
    Run("rejection", "demo", (SHORT, REJECTION), metrics=(*METRICS, *UNCLOCKED)),
    Run("rollout-bf16", "demo", (SAMPLING, _drafts("always", "coupled", "w8a8")), "rollout"),
    Run("rollout-f32", "demo", (SAMPLING, FILTERS), "rollout"),
)


def main() -> int:
    options = _options()
    earlier = json.loads(Path(options.compare).read_text()) if options.compare else None
    if options.against:
        record = json.loads(Path(options.against).read_text())
    else:
        with tempfile.TemporaryDirectory() as folder:
            runs = (
                resume_runs(Path(options.resume), Path(folder)) if options.resume else record_runs(Path(folder), options.keep)
            )
        record = {"machine": _machine(), "runs": runs}
    for name, value in record["machine"].items():
        print(f"{name}: {value}")
    if options.out:
        Path(options.out).write_text(json.dumps(record, indent=1))
    same = compare_with_twins(record["runs"])
    if earlier is not None:
        for name, value in earlier["machine"].items():
            if value != record["machine"].get(name) and name != "commit":
                print(f"recorded with another {name}: {value}; bits may differ by rounding")
        before = earlier["runs"]
        names = record["runs"] if options.resume else before
        same &= all([compare(name, before.get(name, {}), record["runs"].get(name, {})) for name in names])
    return 0 if same else 1


def record_runs(folder: Path, keep: str | None) -> dict[str, Quantities]:
    """All runs, in a folder. `keep`: directory that gets a copy of it while there are stopped runs in it."""
    for run in (SFT, PP2, *RESUMED, *WHOLE):
        run.write(folder)
    _execute(folder, "demo", "--config", f"{PP2.name}.yaml", "--warm-start", f"{SFT.name}.yaml")
    _stop(folder, ADAPTIVE_RUN, (folder / "adaptive.reached").exists)
    shutil.copytree(folder / ADAPTIVE_RUN.output, folder / ADAPTIVE_TP2.output)
    _stop(folder, SFT_STOPPED, lambda: len(_steps(folder / SFT_STOPPED.output)) > 5)
    if keep:
        shutil.copytree(folder, keep)
        print(f"stopped runs are in {keep}", flush=True)
    found = {run.name: quantities(folder, run) for run in (SFT, PP2)} | _resume(folder)
    for run in WHOLE:
        _execute(folder, *run.arguments())
        found[run.name] = quantities(folder, run)
    return found


def resume_runs(kept: Path, folder: Path) -> dict[str, Quantities]:
    """The stopped runs that `record_runs` has kept, with the configurations that lie there, which stay as they are."""
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    return _resume(folder)


def _resume(folder: Path) -> dict[str, Quantities]:
    kept = _kept_responses(folder / ADAPTIVE_RUN.output)
    for run in RESUMED:
        _execute(folder, *run.arguments())
    found = {run.name: quantities(folder, run) for run in RESUMED}
    for run in (ADAPTIVE_RUN, ADAPTIVE_TP2):
        final = _scored(folder, run)
        begun = [_is_beginning(ids, final, prompt) for prompt, ids in kept]
        print(f"{run.name}: {len(kept)} responses were kept, {sum(begun)} begin the final ones", flush=True)
        assert kept and all(begun), "what was kept of the stopped rollout is not what was sampled in the end"
    return found


def _execute(folder: Path, *arguments: str) -> None:
    process, log = _start(folder, arguments)
    if process.wait(PATIENCE_SECONDS):
        sys.exit(f"erollout {' '.join(arguments)} failed:\n{log.read_text()[-4000:]}")


def _stop(folder: Path, run: Run, is_time: Callable[[], bool]) -> None:
    """Start a run and ask it to stop in its middle: a scorer waits for that."""
    hold = folder / f"{run.name}.stop"
    hold.write_text(str(STOP_AT))
    process, log = _start(folder, run.arguments())
    while not is_time() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    status = process.wait(PATIENCE_SECONDS)
    hold.unlink()
    if status or (folder / run.exported).exists():
        sys.exit(f"{run.name} did not stop as it was asked to ({status}):\n{log.read_text()[-4000:]}")


def _start(folder: Path, arguments: Iterable[str]) -> "tuple[subprocess.Popen[bytes], Path]":
    """The package is that of this script's repository, wherever it is installed from."""
    print("erollout", *arguments, flush=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = folder / "output.log"
    with open(log, "ab") as output:
        command = [sys.executable, "-W", "ignore", "-m", "erollout", *arguments]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output), log


def quantities(folder: Path, run: Run) -> Quantities:
    """What a finished run has left."""
    if run.command == "rollout":
        return _rollout_file(folder / f"{run.name}.jsonl")
    found = _metrics(folder / run.output, run.metrics)
    newest = max(path for path in (folder / run.output / "checkpoints").glob("step_*") if path.is_dir())
    found |= {"checkpoint state": _state(newest), "checkpoint tensors": _checkpoint_tensors(newest)}
    weights = {
        name: _digest(tensor) for path in _safetensors(folder / run.exported) for name, tensor in load_file(path).items()
    }
    if run.command == "train":
        scored = _scored(folder, run)
        assert run in RESUMED or sum(len(ids) for _, _, ids in scored) == _sampled(folder / run.output), "a response is missing"
        found |= {"token ids": _token_ids(scored)}
    return found | {"final weights": weights}


def _metrics(output: Path, names: tuple[str, ...]) -> Quantities:
    """Metrics of all steps, by the first word of their names."""
    found: Quantities = defaultdict(dict)
    for step, values in sorted(_steps(output).items()):
        for name, value in values.items():
            if name.startswith(names) and not any(word in name for word in SPEEDS):
                found[name.partition("/")[0]][f"step {step} {name}"] = float(value).hex()
    return dict(found)


def _steps(output: Path) -> dict[int, dict[str, float]]:
    """Metrics of each step so far, out of the journal: an attempt that goes on forgets the steps after its checkpoint."""
    steps: dict[int, dict[str, float]] = {}
    journal = output / "tracking" / "metrics.jsonl"
    for line in journal.read_text().splitlines(keepends=True) if journal.exists() else ():
        record = json.loads(line) if line.endswith("\n") else {"kind": "torn"}
        if record["kind"] == "start" and record.get("step") is not None:
            steps = {step: values for step, values in steps.items() if step <= record["step"]}
        if record["kind"] == "metrics":
            steps.setdefault(record["step"], {}).update(record["values"])
    return steps


def _sampled(output: Path) -> int:
    """Tokens of all responses of a run, as its metrics count them: what went through the scorer as text must be as many."""
    values = _steps(output).values()
    trained = sum(row.get("rollout/tokens", 0.0) for row in values)
    return round(trained + HELD_OUT * sum(row.get("evaluation/response_length_mean", 0.0) for row in values))


def _token_ids(scored: list[Response]) -> dict[str, str]:
    """Token ids of all responses by blocks of prompts, each with those of a step and the held-out ones of equal indices."""
    blocks: dict[int, set[str]] = defaultdict(set)
    for prompt, prompt_ids, ids in scored:
        blocks[prompt // PROMPTS].add(json.dumps([prompt, prompt_ids, ids]))
    return {f"prompts {b * PROMPTS} to {(b + 1) * PROMPTS - 1}": _sha("\n".join(sorted(blocks[b]))) for b in sorted(blocks)}


def _scored(folder: Path, run: Run) -> list[Response]:
    """Responses that a scorer had: not those by which a run tries the scorer out."""
    tokenizer = Tokenizer.from_file(str(folder / "runs/demo/tokenizer/tokenizer.json"))
    end = tokenizer.token_to_id("<eos>")
    found = []
    for file in (folder / f"{run.name}.scored").glob("*.jsonl"):
        for index, prompt_ids, text in map(json.loads, file.read_text().splitlines()):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            if len(ids) == MAX_TOKENS or ids[-1:] == [end]:
                found.append((index, prompt_ids, ids))
    return found


def _kept_responses(output: Path) -> list[tuple[int, list[int]]]:
    """Prompt index and token ids of what the newest checkpoint has of a stopped rollout."""
    (file,) = output.glob("checkpoints/step_*/rollouts.npz")
    with np.load(file, allow_pickle=False) as arrays:
        places, ids = arrays["places"], arrays["response_ids"]
    ends = np.cumsum(places[:, 2])
    return [(int(place[0]), ids[end - place[2] : end].tolist()) for place, end in zip(places, ends, strict=True)]


def _is_beginning(ids: list[int], final: list[Response], prompt: int) -> bool:
    return any(index == prompt and response[: len(ids)] == ids for index, _, response in final)


def _rollout_file(path: Path) -> Quantities:
    """The columns of a JSONL file, one line per response."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {column: {f"{len(rows)} responses": _sha(json.dumps([row[column] for row in rows]))} for column in sorted(rows[0])}


def _state(checkpoint: Path) -> dict[str, str]:
    document = json.loads((checkpoint / "state.json").read_text())
    rollout = document["rollout"] or {}
    chosen = {name: document[name] for name in STATE} | {"response lengths": rollout.get("lengths")}
    return {name: json.dumps(value, sort_keys=True) for name, value in chosen.items()}


def _checkpoint_tensors(checkpoint: Path) -> dict[str, str]:
    """Model and optimizer, as torch.distributed.checkpoint reads them without the program that wrote them."""
    tensors: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner()
    _load_state_dict(tensors, FileSystemReader(checkpoint), planner=planner, no_dist=True)
    return {name: _digest(value) for name, value in _flat(tensors).items() if isinstance(value, torch.Tensor)}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _safetensors(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()[:32]}"


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _configuration(name: str) -> dict[str, Any]:
    """A file of configs/ with what it extends."""
    tree = yaml.safe_load((ROOT / "configs" / name).read_text())
    base = tree.pop("extends", None)
    return _merged(_configuration(base), tree) if base else tree


def _merged(tree: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for key, value in changes.items():
        merged[key] = _merged(merged.get(key) or {}, value) if isinstance(value, Mapping) else value
    return merged


def compare_with_twins(runs: Mapping[str, Quantities]) -> bool:
    """Runs that were stopped, or speculated, against those that weren't."""
    pairs = [(run.equals, run.name) for run in RESUMED if run.equals in runs and run.name in runs]
    return all([compare(f"{other} = {name}", runs[other], runs[name]) for other, name in pairs if other])


def compare(title: str, before: Quantities, now: Quantities) -> bool:
    """Print, for each quantity, whether all of it is equal. What is new is no difference."""
    same = bool(before)
    for quantity, values in before.items():
        found = now.get(quantity, {})
        different = [key for key in values if found.get(key) != values[key]]
        same &= not different
        text = f"{len(values)} equal"
        if different:
            key = different[0]
            text = (
                f"{len(different)} of {len(values)} DIFFER, first {key}: {values[key][:60]} -> {found.get(key, 'missing')[:60]}"
            )
        print(f"{title:<24}{quantity:<22}{text}")
    if not before:
        print(f"{title:<24}not in the record")
    return same


def _machine() -> dict[str, str]:
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = fields.get("flags", "").split()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "processor": fields.get("model name", platform.machine()),
        "instructions": " ".join(flag for flag in SHOWN_FLAGS if flag in flags),
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "limit of instructions": os.environ.get("EROLLOUT_MAX_CPU_ISA", "none"),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("megatron-core", "transformers", "numpy")),
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE", help="where the record is written")
    parser.add_argument("--keep", metavar="DIR", help="where stopped runs are left for --resume; must not be there yet")
    parser.add_argument("--compare", metavar="FILE", help="earlier record; exit status 1 where it differs")
    parser.add_argument("--with", metavar="FILE", dest="against", help="record to compare instead of running")
    parser.add_argument("--resume", metavar="DIR", help="what --keep has left: resume it instead of running all")
    options = parser.parse_args()
    if not (options.out or options.compare):
        parser.error("nothing to do: give --out FILE, --compare FILE or both")
    if options.keep and (options.resume or options.against or Path(options.keep).exists()):
        parser.error("--keep DIR is for runs made here, and DIR must not be there yet")
    return options


if __name__ == "__main__":
    sys.exit(main())
