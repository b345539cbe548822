"""Speculative decoding by drafter format and number of drafts: acceptance, component times and tokens per second beside the
autoregressive (AR) engine, on one thread.

    make demo-rollout                       # makes the policy: SmolLM2-135M, taught chain sums
    python benchmarks/speculation.py        # needs the `benchmark` and `modelopt` extras

Arms run in one process in rotated order; figures are medians over the rounds. Times are CPU seconds of the process, all its
threads together, so that other processes on the machine distort them less. The 135M policy answers the same held-out prompts
in every arm, with its natural stops; at most so many sequences as the table says run at once. The model of 541M has random
weights, so its acceptance means nothing and only component times are reported.

T_T is the target's pass over one token of each sequence, T_V the one over 1 + n; T_D is a draft of one token with its sampling.
Only passes in which all sequences decode count. The predicted speed-up is L / (n r + v), with the acceptance length L of that
very run, r = T_D / T_T and v = T_V / T_T: it knows nothing of verification, of scheduling, nor of a batch that runs dry.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decode import machine, timed
from transformers import logging

from erollout.config import ModelConfig, RolloutConfig, load_config
from erollout.data.datasets import build_datasets
from erollout.data.prompts import PromptLimits
from erollout.data.tokenizer import load_tokenizer
from erollout.drafter.description import DrafterDescription
from erollout.drafter.drafter import Drafter
from erollout.drafter.formats import FORMATS
from erollout.drafter.self_speculation import SelfSpeculation
from erollout.engine.engine import Engine
from erollout.engine.model.decode_layout import decode_placement
from erollout.engine.proposers.proposer_set import RequantizeStats
from erollout.engine.scheduler import Batch
from erollout.policy.families import policy_architecture
from erollout.policy.initialization import first_weights
from erollout.speculation.statistics import SpeculationStatistics, merge
from erollout.speculation.step import Arm as DecodeArm
from erollout.types import Rollout, RolloutRequest, SamplingParams

CONFIG = Path(__file__).parent.parent / "configs" / "demo-rollout.yaml"
RANDOM_541M = {
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
"""541M parameters in the layers."""
MAX_MODEL_LEN = 512


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and what it is to generate."""

    name: str
    source: ModelConfig
    requests: list[RolloutRequest]
    formats: list[str]
    natural: bool
    """Whether its acceptance means anything."""


@dataclass(slots=True)
class Passes:
    """CPU seconds of an engine's passes, by (sequences, tokens)."""

    target: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    drafts: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    def watch(self, engine: Engine) -> None:
        """Time the target's passes from now on."""
        run = engine.runner.run

        def timed_run(batch: Batch, *args: Any) -> Any:
            key = len(batch.scheduled), sum(item.num_tokens + item.num_drafts for item in batch.scheduled)
            return _record(self.target, key, partial(run, batch, *args))

        engine.runner.run = timed_run  # type: ignore[method-assign]

    def watch_drafts(self, drafter: Drafter) -> None:
        propose = drafter.propose
        drafter.propose = lambda request: _record(  # type: ignore[method-assign]
            self.drafts, (len(request.sequences), sum(request.num_drafts)), partial(propose, request)
        )


def _record(seconds: dict[tuple[int, int], list[float]], key: tuple[int, int], function: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = function()
    seconds.setdefault(key, []).append(time.process_time() - start)
    return result


@dataclass(slots=True)
class Arm:
    """One way to generate, and what came of it. AR is 0 drafts of no drafter, "off" 0 drafts of some drafter."""

    name: str
    engine: Engine
    drafter: Drafter | None
    num_drafts: int
    passes: Passes
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    speculation: list[SpeculationStatistics] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)

    def run(self, requests: Sequence[RolloutRequest], verification: Any) -> None:
        drafters = {} if self.drafter is None else {"": self.drafter}
        self.engine.speculate(drafters, DecodeArm("", self.num_drafts), verification)
        spent = timed(lambda: self._generate(requests))
        self.seconds.append(spent.cpu)
        self.wall.append(spent.wall)
        self.speculation.append(self.engine.stats.speculation)

    def _generate(self, requests: Sequence[RolloutRequest]) -> None:
        self.rollouts = self.engine.generate(requests)

    @property
    def tokens(self) -> int:
        return sum(len(rollout.response_ids) for rollout in self.rollouts)

    def forget(self) -> None:
        """Drop the measurements of the warm-up."""
        self.seconds, self.wall, self.speculation = [], [], []


def build_engine(subject: Subject, options: argparse.Namespace) -> Engine:
    architecture = policy_architecture(subject.source)
    rollout = RolloutConfig(dtype="bfloat16", kv_cache_gib=0.25, kernels=options.kernels)
    engine = Engine(architecture, rollout, None, torch.device("cpu"), None, MAX_MODEL_LEN)
    first_weights(engine.local_tensors(), architecture, subject.source, decode_placement(architecture, 1, 0), 0)
    engine.weights_updated(0)
    return engine


def build_speculation(engine: Engine, name: str, options: argparse.Namespace) -> SelfSpeculation:
    described = DrafterDescription.named(name)
    assert described is not None
    drafter = {
        "format": described.format,
        "group_size": options.group_size,
        "lm_head": "w8a8" if described.has_own_head else "target",
    }
    choices = [f"speculation.drafter.{key}={value}" for key, value in drafter.items()]
    choices += [f"speculation.verification={options.verification}", f"rollout.kernels={options.kernels}"]
    speculation = SelfSpeculation(load_config(CONFIG, choices).speculation, engine)
    speculation.switch(True)
    return speculation


def requantize(speculation: SelfSpeculation) -> RequantizeStats:
    speculation.all_landed()
    return speculation.complete(0)


def policy_subject(options: argparse.Namespace) -> Subject:
    """SmolLM2-135M as `make demo-rollout` leaves it, on that demo's held-out prompts."""
    config = load_config(CONFIG)
    directory = str(Path(options.policy or str(config.model.path)).expanduser())
    if not Path(directory, "config.json").is_file():
        raise SystemExit(f"{directory}: no policy there; make it with `make demo-rollout`, or name one with --policy")
    source = ModelConfig(path=directory, max_position_embeddings=MAX_MODEL_LEN)
    architecture = policy_architecture(source)
    tokenizer = load_tokenizer(directory, architecture.vocab_size)
    data = build_datasets(config.data, PromptLimits(config.rollout.max_prompt_tokens, MAX_MODEL_LEN), tokenizer)[1]
    assert data is not None
    sampling = SamplingParams(max_tokens=config.rollout.max_tokens, stop_token_ids=architecture.eos_token_ids)
    wanted = max(max(options.batches) * 3, options.responses)
    requests = [RolloutRequest(i, data.prompt(i).prompt_ids, 1, sampling, seed=i) for i in range(wanted)]
    return Subject("SmolLM2-135M, taught chain sums", source, requests, options.formats, natural=True)


def random_subject(options: argparse.Namespace) -> Subject:
    """Searches for scales are left out: they change no time."""
    sampling = SamplingParams(max_tokens=16, ignore_eos=True)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, 16_000, (max(options.batches), 32), generator=generator).tolist()
    requests = [RolloutRequest(i, tuple(ids), 1, sampling, seed=i) for i, ids in enumerate(prompts)]
    formats = list(dict.fromkeys(name.replace("_clip", "").replace("_awq", "") for name in options.formats))
    return Subject("541M, random weights", ModelConfig(architecture=RANDOM_541M), requests, formats, natural=False)


def build_arms(subject: Subject, options: argparse.Namespace) -> tuple[list[Arm], list[str]]:
    """AR first, then configured but off, then each drafter with each number of drafts. And the lines about requantising.

    All arms share one engine, AR without a proposer as it is built: where the weights of two engines lie in memory makes one
    of them faster by up to 15 %, for as long as the process lives.
    """
    engine, passes = build_engine(subject, options), Passes()
    written = engine.generate(subject.requests[:8])  # what the drafters learn from, as from a training step
    arms = [Arm("AR", engine, None, 0, Passes())]
    lines = ["| drafter | matmuls | its own MiB | requantise + pack, s |", "|---|---|---|---|"]
    for name in subject.formats:
        speculation = build_speculation(engine, name, options)
        speculation.learn_from(written)
        made, drafter = [requantize(speculation) for _ in range(3)], speculation.drafter
        seconds = statistics.median(stats.seconds for stats in made[1:])  # the first one allocates
        matmuls = ", ".join(sorted(set(drafter.matmuls.values())))
        lines.append(f"| {name} | {matmuls} | {made[0].buffer_bytes / 2**20:.0f} | {seconds:.2f} |")
        if len(arms) == 1:
            arms.append(Arm("off", engine, drafter, 0, Passes()))
        own = Passes(target=passes.target)
        own.watch_drafts(drafter)
        arms += [Arm(name, engine, drafter, n, own) for n in options.n]
    arms[0].passes.target = passes.target
    passes.watch(engine)
    return arms, lines


def measure(subject: Subject, arms: list[Arm], sequences: int, options: argparse.Namespace) -> None:
    """All arms in turn, beginning with another one each round."""
    count = max(3 * sequences, options.responses) if subject.natural else sequences
    for arm in arms:
        arm.engine.rollout = replace(arm.engine.rollout, max_num_seqs=sequences)
        arm.passes.target.clear()
        arm.passes.drafts.clear()
        arm.run(subject.requests[:2], options.verification)
        arm.forget()
    for index in range(options.rounds):
        first = index % len(arms)
        for arm in arms[first:] + arms[:first]:
            arm.run(subject.requests[:count], options.verification)


@dataclass(frozen=True, slots=True)
class Components:
    """Milliseconds; None where no pass had all sequences decoding."""

    target: float | None
    draft: float | None
    verify: float | None

    @classmethod
    def of(cls, ar: Arm, arm: Arm, sequences: int) -> "Components":
        n = arm.num_drafts
        draft = _median(arm.passes.drafts.get((sequences, sequences * n)))
        return cls(
            _median(ar.passes.target.get((sequences, sequences))),
            draft / n if draft is not None else None,
            _median(arm.passes.target.get((sequences, sequences * (1 + n)))),
        )

    def speed_up(self, num_drafts: int, acceptance_length: float) -> float | None:
        if self.target is None or self.draft is None or self.verify is None:
            return None
        return acceptance_length * self.target / (num_drafts * self.draft + self.verify)


def _median(seconds: list[float] | None) -> float | None:
    return statistics.median(seconds) * 1e3 if seconds else None


def _figure(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else f"{value:{form}}"


POLICY_COLUMNS = (
    *("drafter", "n", "sequences", "acceptance rate", "length", "T_T, ms", "T_D, ms", "T_V, ms", "tokens/s", "AR tokens/s"),
    *("speed-up (range)", "by wall clock", "predicted", "measured / predicted", "responses unlike AR's"),
)
RANDOM_COLUMNS = ("drafter", "n", "sequences", "T_T, ms", "T_D, ms", "T_V, ms", "r", "v", "speed-up if 0.9 are accepted")


def policy_row(ar: Arm, arm: Arm, sequences: int) -> list[str]:
    spoken, n = merge(arm.speculation), arm.num_drafts
    parts = Components.of(ar, arm, sequences)
    ratios = [a / b * arm.tokens / ar.tokens for a, b in zip(ar.seconds, arm.seconds, strict=True)]
    speed_up, predicted = statistics.median(ratios), parts.speed_up(n, spoken.acceptance_length)
    wall = statistics.median(a / b * arm.tokens / ar.tokens for a, b in zip(ar.wall, arm.wall, strict=True))
    unlike = sum(a.response_ids != b.response_ids for a, b in zip(ar.rollouts, arm.rollouts, strict=True))
    return [
        *(arm.name, str(n), str(sequences), f"{spoken.acceptance_rate:.3f}", f"{spoken.acceptance_length:.2f}"),
        *(_figure(part) for part in (parts.target, parts.draft, parts.verify)),
        *(f"{each.tokens / statistics.median(each.seconds):.1f}" for each in (arm, ar)),
        f"{speed_up:.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
        f"{wall:.2f}",
        _figure(predicted),
        _figure(speed_up / predicted if predicted else None),
        str(unlike),
    ]


def random_row(ar: Arm, arm: Arm, sequences: int) -> list[str]:
    n, parts = arm.num_drafts, Components.of(ar, arm, sequences)
    shares = [part / parts.target if part and parts.target else None for part in (parts.draft, parts.verify)]
    times = [_figure(part) for part in (parts.target, parts.draft, parts.verify)]
    speed_up = parts.speed_up(n, sum(0.9**k for k in range(n + 1)))
    return [arm.name, str(n), str(sequences), *times, *(_figure(share) for share in shares), _figure(speed_up)]


def off_row(ar: Arm, off: Arm, sequences: int) -> list[str]:
    ratios = [b / a for a, b in zip(ar.seconds, off.seconds, strict=True)]
    return [str(sequences), f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f}-{max(ratios):.3f}"]


def report(subject: Subject, options: argparse.Namespace) -> list[str]:
    """Measure a model; rows are printed as they come. Returns the lines of the report."""
    arms, requantized = build_arms(subject, options)
    ar, off, *speculative = arms
    columns, row = (POLICY_COLUMNS, policy_row) if subject.natural else (RANDOM_COLUMNS, random_row)
    rows, offs = [], []
    for sequences in options.batches:
        measure(subject, arms, sequences, options)
        offs.append(off_row(ar, off, sequences))
        for arm in speculative:
            rows.append(row(ar, arm, sequences))
            print(_line(rows[-1]), flush=True)
    rows.sort(key=lambda cells: (subject.formats.index(cells[0]), int(cells[1])))
    lines = [f"## {subject.name}", "", *_table(columns, rows), "", *requantized, ""]
    lines += ["Configured but off, CPU seconds over those without a proposer:", ""]
    return [*lines, *_table(("sequences", "median", "range"), offs), ""]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(columns: Sequence[str], rows: list[list[str]]) -> list[str]:
    return [_line(columns), "|" + "---|" * len(columns), *map(_line, rows)]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _formats(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if DrafterDescription.named(name) is None:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(FORMATS)} (each also with +head)")
    return names


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="135m,541m", help="135m (the policy), 541m (random weights), or both")
    parser.add_argument("--policy", help="directory of the policy; default: what make demo-rollout made")
    parser.add_argument("--formats", type=_formats, default=_formats("w4a16_clip,w4a16_clip+head,w4a8_clip+head,w8a8+head"))
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--n", type=_numbers, default=[1, 3, 5], help="numbers of drafts")
    parser.add_argument("--batches", type=_numbers, default=[1, 2, 4, 8, 16], help="sequences at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--responses", type=int, default=8, help="at least; three times the sequences at once otherwise")
    parser.add_argument("--kernels", default="auto", choices=("auto", "native", "prepacked", "torch"))
    parser.add_argument("--verification", default="coupled", choices=("coupled", "rejection"))
    parser.add_argument("--quick", action="store_true", help="the policy, one format, 3 drafts, 1 and 8 sequences, one round")
    options = parser.parse_args()
    if options.quick:
        options.models, options.formats, options.n = "135m", options.formats[:1], [3]
        options.batches, options.rounds = [1, 8], 1
    return options


def main() -> None:
    options, start = parse(), time.perf_counter()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    subjects = {"135m": policy_subject, "541m": random_subject}
    lines = machine()
    lines += [f"{options.rounds} rounds, {options.verification}, groups of {options.group_size}.", ""]
    for name in options.models.split(","):
        lines += report(subjects[name](options), options)
    print("\n" + "\n".join(lines) + f"\nElapsed: {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
