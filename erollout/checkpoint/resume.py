"""Changes of the configuration allowed when a run resumes from a checkpoint. Pure.

Every key is in one of three tables: a change takes effect from the next step, is refused with a fix, or has no effect any more.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from erollout.checkpoint.manifest import STATE, complete_checkpoints
from erollout.config import LOCATIONS, Config, ModelConfig, OptimizerConfig
from erollout.configuration.renamed import present_name
from erollout.errors import UserError
from erollout.policy.architecture import Architecture

RunKind = Literal["reinforcement learning", "supervised"]

_LONGEST = 100
"""Longest value shown in a message, in characters."""
ELSEWHERE = "set train.output_dir to another directory to start another run"

OBEYED: Mapping[str, str] = {
    "model": "tokenizer max_position_embeddings",
    "parallel": "world_size tensor_model_parallel_size pipeline_model_parallel_size sequence_parallel timeout_seconds",
    "rollout": "prompts_per_step group_size tensor_model_parallel_size dtype temperature top_k top_p min_p repetition_penalty "
    "max_prompt_tokens max_tokens stop stop_token_ids ignore_eos block_size num_kv_blocks kv_cache_gib max_num_seqs "
    "max_num_batched_tokens kernels special_tokens",
    "speculation": "mode proposer num_speculative_tokens verification calibration decision_interval trace_interval",
    "speculation.toggle": "max_speculative_tokens acceptance_window probe_interval probe_steps bootstrap_seconds",
    "speculation.toggle.ladder": "rungs raise_above lower_below persistence",
    "speculation.drafter": "format group_size alternatives lm_head overrides statistics_tokens statistics_interval",
    "speculation.ngram": "max_ngram min_ngram window",
    "coordinator": "policy dispatch lock_step window_seconds stall_seconds",
    "algorithm": "name clip_ratio_low clip_ratio_high normalize_advantages kl_coefficient kl_estimator kl_placement "
    "entropy_coefficient aggregation",
    "rewards": "function import_path stop_when_all_fail pool num_workers timeout_seconds error_value threshold",
    "data": "kind tasks train_files test_files prompt_column answer_column system_prompt instruction chat_template train_seed "
    "train_size test_seed test_size args date",
    "evaluation": "interval num_prompts samples_per_prompt temperature",
    "optimizer": "lr min_lr lr_decay_style lr_warmup_steps weight_decay adam_beta1 adam_beta2 adam_eps clip_grad",
    "train": "steps global_batch_size max_tokens_per_micro_batch recompute_granularity output_dir save_rollouts",
    "train.profile": "steps",
    "supervised": "steps batch_size",
    "tracking": "enabled uri run_name num_sample_rollouts train_samples_interval system_metrics figures",
    "checkpoint": "directory interval keep_last asynchronous resume export_path",
    "fault_tolerance": "heartbeat_seconds hang_seconds max_nonfinite_steps checksum_interval",
}
"""Keys by section. The learning rate follows the new schedule at the number of updates made so far."""

REFUSED: Mapping[str, str] = {
    "model.architecture": f"the checkpoint has that model; set it to that, or {ELSEWHERE}",
    "model.dtype": f"the optimizer's state has that type; set it to that, or {ELSEWHERE}",
    "optimizer.use_distributed_optimizer": f"the optimizer's state is laid out by it; set it to that, or {ELSEWHERE}",
    "train.seed": f"all samples of a run are functions of it; set it to that, or {ELSEWHERE}",
}
"""Keys with reason and fix."""

UNREAD: Mapping[str, str] = {
    "model.path": "the policy's weights are loaded from the checkpoint; a reference policy is read from the new path",
    "tracking.experiment": "the run stays in its experiment",
}
"""Keys whose new value has no effect but the one stated here."""


_PER_STEP: Mapping[RunKind, str] = {"reinforcement learning": "rollout.prompts_per_step", "supervised": "supervised.batch_size"}
"""Keys with the number of items that a step draws."""


@dataclass(frozen=True, slots=True)
class Change:
    """A key whose value differs from the checkpoint's. Values are as in JSON."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        note = f" ({UNREAD[self.key]})" if self.key in UNREAD else ""
        return f"{self.key} = {_text(self.before)} -> {_text(self.now)}{note}"


def keys(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a configuration with its value (`speculation.toggle.probe_steps`); a list or mapping is one key."""
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield from keys(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def configuration(config: Config) -> dict[str, Any]:
    """Every key by its dotted name, with values as in JSON and absolute paths."""
    found = {key: _absolute(value) if key in LOCATIONS else value for key, value in keys(config)}
    plain: dict[str, Any] = json.loads(json.dumps(found, default=asdict))
    return plain


def changes(saved: Mapping[str, Any], config: Config) -> list[Change]:
    """Keys whose values differ from those saved with a checkpoint. Keys that only one of the two has are not compared."""
    before = {present_name(key): value for key, value in saved.items()}
    return [Change(key, before[key], now) for key, now in configuration(config).items() if key in before and before[key] != now]


def drawn(document: Mapping[str, Any], config: Config, kind: RunKind) -> int:
    """Prompts or examples that a checkpoint's run has drawn; where its STATE does not say, as many as its steps always took."""
    if "cursor" in document:
        return int(document["cursor"])
    key = _PER_STEP[kind]
    return int(document["step"] * document.get("configuration", {}).get(key, configuration(config)[key]))


def identity(architecture: Architecture, model: ModelConfig, optimizer: OptimizerConfig) -> dict[str, Any]:
    """Properties of model and optimizer that must be equal in the run that loads the checkpoint."""
    sizes = {key: value for key, value in asdict(architecture).items() if key != "layer"}  # which is its family's
    return {
        "architecture": json.loads(json.dumps(sizes)),
        "dtype": model.dtype,
        "use_distributed_optimizer": optimizer.use_distributed_optimizer,
    }


def require_resumable(
    path: Path, document: Mapping[str, Any], architecture: Architecture, config: Config, kind: RunKind
) -> None:
    """Raise UserError, with key and fix, if this configuration can't resume from the checkpoint at `path`.

    `document`: content of its STATE file.
    """
    if document["kind"] != kind:
        raise UserError(
            f"checkpoint {path} is from a {document['kind']} run, this is a {kind} run; set train.output_dir to another place "
            "(a policy is handed on by checkpoint.export_path and model.path)"
        )
    require_model(path, document, architecture, config)
    for change in changes(document.get("configuration", {}), config):
        if change.key == "model.architecture":  # covered by the model's identity
            continue
        if change.key in REFUSED:
            raise UserError(
                f"{change.key} = {_text(change.now)}, but checkpoint {path} was saved with {_text(change.before)}: "
                f"{REFUSED[change.key]}"
            )


def check_newest(architecture: Architecture, config: Config, kind: RunKind) -> None:
    """Raise UserError, before anything is written, if the newest checkpoint exists but can't be resumed from.

    A damaged one is set aside only when it is loaded.
    """
    found = complete_checkpoints(config.checkpoint_directory)
    if not found:
        return
    if not config.checkpoint.resume:
        raise UserError(
            f"checkpoint.resume = false but {found[-1]} exists; set it to true, or checkpoint.directory to a new directory"
        )
    try:
        document = read_state(found[-1])
    except UserError:
        return
    require_resumable(found[-1], document, architecture, config, kind)


def read_state(path: Path) -> dict[str, Any]:
    """Content of the STATE file of the checkpoint at `path`. Raises UserError."""
    try:
        document: dict[str, Any] = json.loads((path / STATE).read_text())
        if missing := {"step", "run_id", "history", "kind", "identity", "scheduler", "rollout"} - document.keys():
            raise ValueError(f"no {min(missing)}")
        if not isinstance(document["identity"]["architecture"], dict) or not isinstance(
            document.get("configuration", {}), dict
        ):
            raise ValueError("it lacks an identity or configuration")
        if missing := {"dtype", "use_distributed_optimizer"} - document["identity"].keys():
            raise ValueError(f"no identity.{min(missing)}")
        for name in ("cursor", "samples", "tokens"):
            if not isinstance(count := document.get(name, 0), int) or count < 0:
                raise ValueError(f"{name} = {count}")
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"checkpoint {path} is damaged: can't read {STATE} ({error}); remove the directory to use the one before"
        ) from error
    return document


def require_model(path: Path, document: Mapping[str, Any], architecture: Architecture, config: Config) -> None:
    """Raise UserError if the checkpoint at `path`, with this STATE file, has another model, dtype or optimizer layout."""
    saved, mine = document["identity"], identity(architecture, config.model, config.optimizer)
    there, here = saved["architecture"], mine["architecture"]
    for key in here:
        if there.get(key) != here[key]:
            raise UserError(
                f"checkpoint {path} has another model: {key} = {there.get(key)} there, {here[key]} here; set "
                "checkpoint.directory to another place or restore the model"
            )
    for key, section in (("dtype", "model"), ("use_distributed_optimizer", "optimizer")):
        if saved[key] != mine[key]:
            raise UserError(f"checkpoint {path} was saved with {section}.{key} = {saved[key]}; set it to that to resume")


def _absolute(value: str | Sequence[str] | None) -> Any:
    if value is None or isinstance(value, str):
        return value and str(Path(value).resolve())
    return [_absolute(item) for item in value]


def _text(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
