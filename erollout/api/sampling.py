"""The commands that sample with a model's weights and train nothing, on every rank: evaluate, compare, calibrate sweep."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from erollout.calibration.measure import sweep_grid, sweep_into
from erollout.checkpoint.saved_policy import SavedPolicy
from erollout.config import Config
from erollout.data.prompts import PromptDataset
from erollout.drafter.registry import proposer_kind
from erollout.errors import UserError
from erollout.parallel.groups import current_rank
from erollout.plots.rollout_figures import rollout_figures
from erollout.plots.style import save
from erollout.rollout.compare import WHERE, Comparison, compare_held_out, drafter_as_in_training
from erollout.rollout.rollout_worker import RolloutWorker
from erollout.rollout.sample_rows import sample_rows
from erollout.tracking.console import print_summary, print_table
from erollout.tracking.parameters import config_subject
from erollout.training.build import reward_pool, sampling_worker
from erollout.training.evaluation import evaluation_metrics
from erollout.training.preflight import require_writable
from erollout.training.world import World, joined


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out responses, equal on all ranks."""

    rows: list[dict[str, object]]
    """A row per response: reward, task, prompt, reference, text, token ids, log-probs, ..."""
    metrics: dict[str, float]
    """As tracked in training: `evaluation/pass_at_1`, ...; and prompts, responses, tokens, seconds, tokens/s."""
    num_held_out: int
    """Prompts in the test data; those beyond `evaluation.num_prompts` were not sampled."""

    def table(self) -> list[tuple[str, object]]:
        """Names and values for a table: accuracy, rewards, amounts, lengths, speed; with several tasks also by task."""
        found, prompts = self.metrics, int(self.metrics["prompts"])
        all_of_them = f"{prompts:,}" if prompts == self.num_held_out else f"{prompts:,} of {self.num_held_out:,}"
        limited = "" if prompts == self.num_held_out else " (evaluation.num_prompts)"
        rates = [(_rate(name), value) for name, value in found.items() if "/pass_at_" in name or name.endswith("/reward_mean")]
        failed = int(found["evaluation/scoring_errors"])
        return [
            ("prompts", all_of_them + limited),
            ("responses", f"{int(found['responses']):,}"),
            *rates,
            ("truncated", f"{found['evaluation/truncated_fraction']:.1%}"),
            ("mean length", f"{found['evaluation/response_length_mean']:.1f} tokens"),
            *([("not scored", f"{failed:,}, which count as rewards.error_value")] if failed else []),
            ("tokens/s", f"{found['tokens/s']:.1f}"),
        ]


def evaluate(config: Config, saved: SavedPolicy | None = None) -> Evaluation:
    """Sample the held-out prompts and score them. Collective. Raises UserError.

    saved: the policy to sample from; None: the model that the configuration names.
    """
    with _sampling(config, saved) as (_, worker, data):
        if worker.speculation is not None and worker.speculation.wants_rollouts:
            logging.getLogger(__name__).info(
                "speculation.drafter.format = %s: this command makes one rollout only, so there is none to learn from",
                config.speculation.drafter.format,
            )
        result = worker.evaluate(data, step=worker.engine.policy_version or 0)  # as the run itself does after that step
        shown = sample_rows(result.scored, data, worker.text)
        rows = [
            {
                "reward": s.reward,
                "task": s.task,
                "prompt": row["prompt"],
                "reference": row["reference"],
                "text": row["response"],
            }
            | asdict(s.rollout)
            for s, row in zip(result.scored, shown, strict=True)
        ]
        seconds = max(report["seconds"] for report in result.reports)
        tokens = sum(report["tokens"] for report in result.reports)
        metrics = evaluation_metrics(result.scored, sum(result.failures.values()))
        prompts = len({s.rollout.prompt_index for s in result.scored})
        metrics |= {"prompts": prompts, "responses": len(rows), "tokens": int(tokens), "seconds": seconds}
        return Evaluation(rows, metrics | {"tokens/s": tokens / seconds}, len(data))


def report(config: Config, saved: SavedPolicy | None, out: str | None) -> None:
    """Evaluate, print a table and, with `out`, write one JSON line per response. Collective. Raises UserError."""
    found = evaluate(config, saved)
    if current_rank() == 0:
        if out is not None:
            _write_lines(Path(out), found.rows)
        policy = str(saved.path) if saved else config.model.path or "random weights (model.architecture)"
        print_summary([("policy", policy), *found.table(), *([("written to", out)] if out else [])])


def compare_modes(config: Config) -> dict[str, Comparison]:
    """Sample the held-out prompts with speculation off and on, in turns. Prints what it saves, and writes plots.

    Returns: comparisons by case: one sequence at a time, and as configured. Collective. Raises UserError.
    """
    if config.speculation.mode == "off":
        raise UserError("speculation.mode = off: there is nothing to compare with; set it to always")
    require_writable("train.output_dir", Path(config.train.output_dir))
    with _sampling(config) as (world, worker, data):
        first, requantize = drafter_as_in_training(worker, data)
        comparisons = compare_held_out(worker, data)
        if world.context.rank == 0:
            options, figures = config.speculation, Path(config.train.output_dir) / "figures"
            for case, comparison in comparisons.items():
                print_summary(comparison.rows(), title=f"speculation off and {options.mode}, {case}")
                print_table(WHERE, comparison.where(), title="where the seconds of a rollout go, and where speculation was on")
            last = comparison.on[-1]
            for name, figure in rollout_figures(last, worker.coordination.last, config_subject(config)).items():
                save(figure, figures / f"{name}.png")
            facts = {
                "drafts": f"{', '.join(proposer_kind(options).drafters(options))}, {options.verification}",
                "requantise seconds": requantize.seconds,
                "why": "\n".join(last.summaries[0].why),
                "plots": str(figures),
            }
            print_summary([*facts.items(), *evaluation_metrics(first.scored).items()], title="drafter and policy")
        return comparisons


def sweep(config: Config, out: str, grid: Mapping[str, tuple[int, ...]], minutes: float) -> None:
    """Time single steps of the configured model and drafters on this device, and append each to a CSV file.

    `grid`: as in calibration.measure.sweep_grid. Raises UserError for a file that is something else than a sweep.
    """
    if config.speculation.mode == "off":
        raise UserError("speculation.mode = off has no drafter to measure; set speculation.mode=adaptive")
    with joined(config) as world, reward_pool(config.rewards, world.resolved) as rewards:
        worker = sampling_worker(world, rewards)
        places = sweep_grid(grid, worker.engine, config.rollout, config.speculation.toggle.max_speculative_tokens)
        model, writes = Path(config.model.path or "random").name, world.context.rank == 0
        done, new = sweep_into(out, worker.engine, worker.coordination.formats, places, minutes, model, writes)
        if writes:
            print_summary([("rows", done + new), ("measured now", new), ("written to", out)], title="sweep")


@contextmanager
def _sampling(config: Config, saved: SavedPolicy | None = None) -> Iterator[tuple[World, RolloutWorker, PromptDataset]]:
    """A worker with a policy's weights, and the held-out prompts."""
    with joined(config) as world, reward_pool(config.rewards, world.resolved) as rewards:
        world.fix_date()
        data = world.resolved.test_data
        if data is None:
            raise UserError("data.test_files is empty: this command samples the test prompts; name at least one file")
        yield world, sampling_worker(world, rewards, saved), data


def _rate(metric: str) -> str:
    """`evaluation/gsm/pass_at_1` as it is called in a table."""
    *task, name = metric.split("/")[1:]
    known = {"pass_at_1": "accuracy (pass@1)", "reward_mean": "mean reward"}
    return ", ".join([known.get(name, name.replace("pass_at_", "pass@")), *task])


def _write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from error
