"""The configuration as a whole: its sections, loading, and what no section can check alone.

The keys are in configuration/keys.py, those of `speculation` in configuration/speculation.py. A YAML file, those that it
extends (configuration/layers.py) and dotted overrides (`optimizer.lr=1e-4`) become one frozen `Config`:
configuration/yaml_tree.py reads them as each key wants its value, configuration/bounds.py has the least and the largest of each
number. What can be checked without starting a process is
checked here; the message names the key, the value and the fix. Where Megatron has an option of the same meaning, the key has
Megatron's name.
"""

from collections.abc import Mapping
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from erollout.configuration.keys import (
    AlgorithmConfig,
    CheckpointConfig,
    CoordinatorConfig,
    DataConfig,
    EvaluationConfig,
    FaultToleranceConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardsConfig,
    RolloutConfig,
    SupervisedConfig,
    TrackingConfig,
    TrainConfig,
)
from erollout.configuration.layers import OVERRIDE, read_layers
from erollout.configuration.section import section
from erollout.configuration.speculation import SpeculationConfig, check_speculation
from erollout.configuration.yaml_tree import describe, fit
from erollout.errors import UserError
from erollout.security.redaction import keys_with_credentials, redact

LOCATIONS = (
    "model.path",
    "model.tokenizer",
    "speculation.calibration",
    "data.train_files",
    "data.test_files",
    "train.output_dir",
    "checkpoint.directory",
    "checkpoint.export_path",
    "rewards.import_path",
)
"""Keys whose values are paths."""


@section
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    """Its keys are in configuration/speculation.py."""
    coordinator: CoordinatorConfig = field(default_factory=CoordinatorConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    fault_tolerance: FaultToleranceConfig = field(default_factory=FaultToleranceConfig)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]  # mypy does not see through section

    @property
    def samples_per_step(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.group_size

    @property
    def checkpoint_directory(self) -> Path:
        return Path(self.checkpoint.directory or Path(self.train.output_dir) / "checkpoints")

    @property
    def tokenizer_path(self) -> str:
        return self.model.tokenizer or self.model.path or ""


_ADAPTER = TypeAdapter(Config)
_MOST_SAMPLES = 10**7


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and those that it extends, apply `key=value` overrides and validate. Raises UserError."""
    return load_layers(path, overrides)[0]


def load_layers(path: str | Path, overrides: list[str] | None = None) -> tuple[Config, dict[str, str]]:
    """As load_config, with the file (or layers.OVERRIDE) that set each key, by dotted key."""
    layers = read_layers(path, overrides or [], Config)
    config = build_config(layers.tree, str(path), layers.origins)
    origin = layers.origins.get("rewards.function", OVERRIDE)
    return _with_import_path(config, Path(path if origin == OVERRIDE else origin).absolute().parent), layers.origins


def _with_import_path(config: Config, directory: Path) -> Config:
    """Default rewards.import_path to the directory of the file that names the function, wherever the run is started."""
    if config.rewards.function is None or config.rewards.import_path is not None:
        return config
    rewards = replace(config.rewards, import_path=str(directory))  # type: ignore[type-var]  # mypy does not see through section
    return replace(config, rewards=rewards)  # type: ignore[type-var]


def build_config(tree: dict[str, Any], source: str = "config", origins: Mapping[str, str] | None = None) -> Config:
    """Validate a nested dict of sections. Raises UserError, which names the origin of the key, or else `source`."""
    try:
        config = _ADAPTER.validate_python(fit(tree, Config))
    except ValidationError as error:
        key, problem = describe(error, Config)
        raise UserError(f"{(origins or {}).get(key, source)}: {problem}") from None
    except RecursionError:
        raise UserError(f"{source}: values are nested too deeply, or contain themselves") from None
    for key, value in keys_with_credentials(config.to_dict()):
        raise UserError(f"{source}: {key} = {redact(value)} has a password or token in it, {_elsewhere(key)}")
    _check_consistency(config)
    return config


def _elsewhere(key: str) -> str:
    """Where a secret belongs instead: configurations are copied to run directories, and overrides appear in process lists."""
    if key == "tracking.uri":
        return (
            "which belongs in the environment: leave it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "leave tracking.uri out and set MLFLOW_TRACKING_URI to the whole"
        )
    return "which would be copied to the run directory; leave it out, and let the program that needs it read it elsewhere"


def _check_consistency(config: Config) -> None:
    """Checks that involve several keys."""
    model, data, rollout = config.model, config.data, config.rollout
    hang, timeout = config.fault_tolerance.hang_seconds, config.parallel.timeout_seconds
    if 0 < hang <= config.fault_tolerance.heartbeat_seconds:
        raise UserError(
            f"fault_tolerance.heartbeat_seconds = {config.fault_tolerance.heartbeat_seconds:g} is not below hang_seconds = "
            f"{hang:g}: a rank would be taken to hang between two signs of life; lower it"
        )
    if hang >= timeout:
        raise UserError(
            f"fault_tolerance.hang_seconds = {hang:g} is not below parallel.timeout_seconds = {timeout}: a hanging "
            "collective would fail before it is said who holds it up; lower the first, raise the second, or set the first to 0"
        )
    if (model.path is None) == (model.architecture is None):
        raise UserError("set exactly one of model.path (a Hugging Face directory) and model.architecture (random weights)")
    if not config.tokenizer_path:
        raise UserError("model.tokenizer is not set and there is no model.path to take it from; set model.tokenizer")
    if not data.test_files:
        require_training_data(config)
    if data.kind == "reasoning_gym" and not data.tasks:
        raise UserError("data.tasks is empty but data.kind = reasoning_gym; name at least one task")
    if "{prompt}" not in data.instruction:
        raise UserError(f"data.instruction = {data.instruction!r} must contain {{prompt}}")
    if data.train_seed < data.test_seed + data.test_size and data.test_seed < data.train_seed + data.train_size:
        raise UserError(
            f"train items [{data.train_seed}, {data.train_seed + data.train_size}) of data.train_seed and data.train_size "
            f"overlap test items [{data.test_seed}, {data.test_seed + data.test_size}) of data.test_seed and data.test_size; "
            "move one"
        )
    if config.optimizer.min_lr > config.optimizer.lr:
        raise UserError(f"optimizer.min_lr = {config.optimizer.min_lr} is above optimizer.lr = {config.optimizer.lr}; lower it")
    if config.parallel.sequence_parallel and config.parallel.tensor_model_parallel_size == 1:
        raise UserError(
            "parallel.sequence_parallel = True needs parallel.tensor_model_parallel_size above 1; raise it or unset it"
        )
    if config.evaluation.interval and data.kind == "file" and not data.test_files:
        raise UserError(
            f"evaluation.interval = {config.evaluation.interval} but data.test_files is empty; name a file or set it to 0"
        )
    if data.kind != "file" and config.evaluation.num_prompts > data.test_size:
        raise UserError(
            f"evaluation.num_prompts = {config.evaluation.num_prompts} is above data.test_size = {data.test_size}; raise that"
        )
    if config.samples_per_step > _MOST_SAMPLES:
        raise UserError(
            f"rollout.prompts_per_step x rollout.group_size = {config.samples_per_step:,} responses of one step are more than "
            f"{_MOST_SAMPLES:,}; lower one"
        )
    batch = config.train.global_batch_size
    if batch and config.samples_per_step % batch:
        raise UserError(
            f"train.global_batch_size = {batch} does not divide rollout.prompts_per_step x rollout.group_size = "
            f"{config.samples_per_step}"
        )
    check_speculation(config.speculation)
    _check_coordinator(config)
    if rollout.truncates and rollout.temperature != 1:
        raise UserError(
            f"rollout.temperature = {rollout.temperature} together with top_k, top_p, min_p or repetition_penalty: the actor "
            "could not compute the log-probs of what was sampled; set the temperature to 1 or the others to their defaults"
        )
    if rollout.temperature == 0 and rollout.group_size > 1:
        raise UserError(
            "rollout.temperature = 0 makes every response of a group the same, so that nothing is learnt; raise it "
            "(evaluation.temperature is a key of its own)"
        )


def require_trainable(config: Config) -> None:
    """Check what reinforcement learning needs: data, and groups of several samples for advantages. Raises UserError."""
    require_training_data(config)
    if config.rollout.group_size == 1:
        raise UserError(
            f"rollout.group_size = 1: {config.algorithm.name.upper()} compares a response with the others to its prompt, and "
            "every advantage would be 0; set it to 2 or more (8 is the default)"
        )


def require_training_data(config: Config) -> None:
    """Check, for training, that there are files to train on: commands that only sample need none. Raises UserError."""
    if config.data.kind == "file" and not config.data.train_files:
        raise UserError("data.train_files is empty but data.kind = file; name at least one JSONL, JSON or parquet file")


def without_training_data(config: Config) -> Config:
    """The configuration without its training files, for commands that sample test prompts only: the files may be elsewhere."""
    tree = config.to_dict()
    if config.data.test_files:
        tree["data"]["train_files"] = []
    return build_config(tree)


def _check_coordinator(config: Config) -> None:
    if config.coordinator.lock_step and config.coordinator.policy != "cluster":
        raise UserError(
            f"coordinator.lock_step = True but coordinator.policy = {config.coordinator.policy}: replicas that share "
            "collectives need one state; set coordinator.policy to cluster"
        )
