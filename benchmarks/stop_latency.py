"""Seconds from a signal to a saved checkpoint, at random moments of a run, and from its start to the end of its first step.

    python benchmarks/stop_latency.py [--signals 12] [--ranks 2] [--layers 4] [--hidden 64] [--max-tokens 320] [--seed 0]

A real `erollout train` on an untrained character model is started, gets SIGUSR1 at a random moment of its steps, and is started
again, as often as asked. Where it was when the signal came, and how long the parts of its start took, is what its heartbeats
say. A checkpoint counts from the moment at which it is complete under its name.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from erollout.checkpoint.manifest import MANIFEST, complete_checkpoints
from erollout.data.tokenizer import save_character_tokenizer
from erollout.doctor.cpu import processor
from erollout.resilience.watchdog import read_heartbeats
from erollout.tracking.console import print_table

LOOK_SECONDS = 0.005
PATIENCE_SECONDS = 300.0


@dataclass
class Attempt:
    """One start of the run. Times are seconds since the epoch."""

    started: float
    phases: list[tuple[float, int, str]] = field(default_factory=list)
    """Begin, step and name, as far as heartbeats were quick enough to see it."""
    signalled: float = 0.0
    saved: float | None = None
    """None: there was nothing new to save."""
    ended: float = 0.0

    @property
    def interrupted(self) -> str:
        """The phase that the signal came in."""
        return next(name for begin, _, name in reversed(self.phases) if begin <= self.signalled)

    @property
    def first_phase(self) -> float | None:
        """When the start was over."""
        return self.phases[1][0] if len(self.phases) > 1 else None

    def first_step(self) -> list[tuple[str, float]]:
        """Names and seconds of all that came before the second step's first phase; empty if it came to none."""
        if not any(step for _, step, _ in self.phases):
            return []
        last = next(index for index, (_, step, _) in enumerate(self.phases) if step)
        begins = [begin for begin, _, _ in self.phases[: last + 1]]
        names = ["building" if name == "start" else name for _, _, name in self.phases[:last]]
        spans = [end - begin for begin, end in pairwise(begins)]
        return [("launcher, imports, checks, meeting", begins[0] - self.started), *zip(names, spans, strict=True)]


def main() -> None:
    options = _options()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        config = _write_config(Path(folder), options)
        run = Path(folder) / "run"
        first = _attempt(config, run, None, 0.0)
        seconds_per_step = first.phases[-1][0] - (first.first_phase or 0.0)
        attempts = [_attempt(config, run, rng, seconds_per_step) for _ in range(options.signals)]
    _report(options, first, attempts, seconds_per_step)


def _attempt(config: Path, run: Path, rng: random.Random | None, seconds_per_step: float) -> Attempt:
    """Start the run and stop it: at a random moment within a step from its first phase on or, without rng, after a step."""
    with _started(config) as (process, attempt):
        moment = rng.uniform(0, seconds_per_step) if rng is not None else 0.0
        while not _has_come(attempt, moment, whole_step=rng is None):
            _look(process, run, attempt)
        process.send_signal(signal.SIGUSR1)
        attempt.signalled = time.time()
        while process.poll() is None:
            if attempt.saved is None and any(
                (path / MANIFEST).stat().st_mtime > attempt.signalled for path in complete_checkpoints(run / "checkpoints")
            ):
                attempt.saved = time.time()
            time.sleep(LOOK_SECONDS)
        attempt.ended = time.time()
    assert process.returncode == 0, "the run failed"
    return attempt


def _has_come(attempt: Attempt, moment: float, whole_step: bool) -> bool:
    if whole_step:
        return any(step for _, step, _ in attempt.phases)
    return attempt.first_phase is not None and time.time() >= attempt.first_phase + moment


def _look(process: "subprocess.Popen[bytes]", run: Path, attempt: Attempt) -> None:
    """Note a phase of rank 0 that is new."""
    assert process.poll() is None, "the run ended by itself"
    assert time.time() < attempt.started + PATIENCE_SECONDS, "the run takes too long"
    for beat in read_heartbeats(run / "heartbeats", 1):
        if beat.since > attempt.started and (not attempt.phases or beat.since > attempt.phases[-1][0]):
            attempt.phases.append((beat.since, beat.step, beat.phase))
    time.sleep(LOOK_SECONDS)


@contextmanager
def _started(config: Path) -> Iterator[tuple["subprocess.Popen[bytes]", Attempt]]:
    started = time.time()
    command = [sys.executable, "-W", "ignore", "-m", "erollout.cli", "train", "--config", str(config)]
    with open(config.with_name("output"), "ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield process, Attempt(started)
    except AssertionError:
        print(config.with_name("output").read_text()[-4000:], file=sys.stderr)
        raise
    finally:
        process.kill()
        process.wait()


def _report(options: argparse.Namespace, first: Attempt, attempts: list[Attempt], seconds_per_step: float) -> None:
    print(f"{options.ranks} ranks, torch {version('torch')}, {processor()[1]}")
    print(f"a step takes {seconds_per_step:.2f} s; {len(attempts)} signals, each at a random moment within one")
    rows = [
        _row(phase, [a for a in attempts if a.interrupted == phase]) for phase in dict.fromkeys(a.interrupted for a in attempts)
    ]
    title = "seconds from the signal"
    print_table(
        ["it came in", "signals", "saved: median", "maximum", "nothing new", "process ended: median", "maximum"],
        [*rows, _row("all", attempts)],
        title,
    )
    parts = first.first_step()
    rows = [[name, f"{seconds:.2f}"] for name, seconds in [*parts, ("all", sum(seconds for _, seconds in parts))]]
    imports = [
        [f"of these, import of {name} alone", f"{_import_seconds(name):.2f}"]
        for name in ("erollout.launch.local", "erollout.training.session")
    ]
    print_table(["from the start to the end of the first step", "seconds"], [*rows, *imports])


def _row(name: str, attempts: list[Attempt]) -> list[Any]:
    saved = [a.saved - a.signalled for a in attempts if a.saved is not None]
    ended = [a.ended - a.signalled for a in attempts]
    figures = [f"{f(values):.2f}" if values else "-" for values in (saved, ended) for f in (median, max)]
    return [name, len(attempts), *figures[:2], len(attempts) - len(saved), *figures[2:]]


def _import_seconds(module: str) -> float:
    code = f"import time; t = time.time(); import {module}; print(time.time() - t)"
    return float(
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, check=True).stdout.split()[-1]
    )


def _write_config(folder: Path, options: argparse.Namespace) -> Path:
    tokenizer = folder / "tokenizer"
    save_character_tokenizer(tokenizer)
    architecture = {
        "model_type": "llama",
        "vocab_size": 67,
        "num_hidden_layers": options.layers,
        "hidden_size": options.hidden,
        "intermediate_size": 4 * options.hidden,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64 + options.max_tokens,
        "tie_word_embeddings": True,
    }
    tree = {
        "model": {"architecture": architecture, "tokenizer": str(tokenizer)},
        "parallel": {"world_size": options.ranks},
        "rollout": {
            "prompts_per_step": 8,
            "group_size": 8,
            "max_prompt_tokens": 64,
            "max_tokens": options.max_tokens,
            "kv_cache_gib": 0.1,
            "max_num_seqs": 16,
            "ignore_eos": True,
        },
        "data": {"kind": "chain_sum_cot", "args": {"max_terms": 4}},
        "train": {"steps": 10**6, "output_dir": str(folder / "run"), "max_tokens_per_micro_batch": 4096},
        "checkpoint": {"interval": 10**6},
        "fault_tolerance": {"heartbeat_seconds": 0.02},
        "tracking": {"enabled": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=12)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=320, help="of each response")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
