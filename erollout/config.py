"""The configuration: every key, its default (written here and nowhere else) and its bounds.

The keys of `speculation` are in configuration/speculation.py, all others here. One YAML file plus dotted overrides
(`optimizer.lr=1e-4`) become one frozen `Config`: configuration/yaml_tree.py reads them as each key wants its value,
configuration/bounds.py has the least and the largest of each number. What can be checked without starting a process is
checked here; the message names the key, the value and the fix. Where Megatron has an option of the same meaning, the key has
Megatron's name.
"""

from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from erollout.configuration import bounds
from erollout.configuration.section import section
from erollout.configuration.speculation import SpeculationConfig, check_speculation
from erollout.configuration.yaml_tree import describe, fit, read_tree
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
class ModelConfig:
    path: bounds.Location | None = None
    """Hugging Face directory (config.json, safetensors, tokenizer) to start from."""
    architecture: dict[str, Any] | None = None
    """Instead of `path`: a Hugging Face config (`model_type: llama`, `hidden_size: 64`, ...) for random weights."""
    tokenizer: bounds.Location | None = None
    """Hugging Face tokenizer directory; default: `path`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of training parameters; with bfloat16, Megatron keeps float32 main parameters and gradients."""
    max_position_embeddings: bounds.Tokens | None = None
    """Longest sequence in tokens; default: the architecture's."""


@section
class ParallelConfig:
    world_size: bounds.Ranks | None = None
    """Number of ranks; default: those of one model, or as many as a launcher starts. Without a launcher, `erollout train`
    starts that many here; under one, it must agree."""
    tensor_model_parallel_size: bounds.Ranks = 1
    pipeline_model_parallel_size: bounds.Ranks = 1
    sequence_parallel: bool = False
    timeout_seconds: bounds.Timeout = 4500
    """Limit of any single collective. Longer than fault_tolerance.hang_seconds, which ends a run with a clearer message."""


@section
class RolloutConfig:
    prompts_per_step: bounds.Samples = 32
    group_size: bounds.Samples = 8
    """Responses sampled from each prompt."""
    tensor_model_parallel_size: bounds.Ranks = 1
    """Tensor-parallel size of a decode replica; the remaining ranks form further replicas."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    temperature: bounds.Temperature = 1.0
    top_k: bounds.Limit = 0
    top_p: bounds.PositiveFraction = 1.0
    min_p: bounds.Fraction = 0.0
    repetition_penalty: bounds.Penalty = 1.0
    max_prompt_tokens: bounds.Tokens = 512
    max_tokens: bounds.Tokens = 256
    """Longest response in tokens."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[bounds.TokenId, ...] = ()
    """Ids that end a response, besides the model's end-of-sequence ids."""
    special_tokens: Literal["content", "all", "none"] = "content"
    """Special tokens kept in the text that is scored and searched for `stop`. `content`: all (`<answer>` may be one) except
    those that begin, end (including `stop_token_ids`) or pad a sequence; `all`: those too; `none`: none."""
    ignore_eos: bool = False
    block_size: bounds.GroupSize = 16
    """Number of tokens per block of the paged KV cache."""
    num_kv_blocks: bounds.Blocks | None = None
    """Number of blocks in the pool; default: as many as `kv_cache_gib` holds."""
    kv_cache_gib: bounds.Gibibytes = 0.5
    """Memory for the KV cache of one rank, in GiB."""
    max_num_seqs: bounds.Slots = 64
    """Largest number of sequences that decode at once on one replica."""
    max_num_batched_tokens: bounds.Tokens = 2048
    """Largest number of tokens in one forward pass: longer prompts are prefilled in chunks."""
    kernels: Literal["auto", "native", "prepacked", "torch"] = "auto"
    """Kernels of the decode model: `native` (bfloat16 on a CPU with AVX2 or AVX-512), `prepacked` (oneDNN, CPU), `torch` (any
    device); `auto` takes the first that can run here. Resolved once and logged."""

    @property
    def truncates(self) -> bool:
        """Whether the sampled distribution differs from the softmax by more than the temperature."""
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0 or self.repetition_penalty != 1


@section
class CoordinatorConfig:
    """Coordination of decode replicas without a server: all see the same occupancies and take the same decisions."""

    policy: Literal["replica", "cluster", "makespan"] = "makespan"
    """`replica`: each one chooses its own arm. `cluster`: one arm for all, the best for their sum. `makespan`: as `replica`,
    and sequences of the tail migrate to idle replicas if the slowest replica is predicted to finish earlier."""
    dispatch: Literal["dynamic", "static"] = "dynamic"
    """How prompts reach replicas. `dynamic`: to the replica predicted to be free first; `static`: round-robin at the start."""
    lock_step: bool = False
    """Whether replicas share collectives, so that all take the same decision at the same step, and wait. Needs `cluster`."""
    window_seconds: bounds.Seconds = 0.05
    """Least time between two windows, in which replicas exchange occupancies."""
    stall_seconds: bounds.Seconds = 5.0
    """Time without a window after which a replica decides for itself until the next one; in lock step it warns and waits."""


@section
class AlgorithmConfig:
    name: Literal["grpo"] = "grpo"
    clip_ratio_low: bounds.Fraction = 0.2
    clip_ratio_high: bounds.Coefficient = 0.2
    normalize_advantages: bool = True
    """Divide a group's advantages by its standard deviation."""
    kl_coefficient: bounds.Coefficient = 0.0
    """Coefficient of the KL to the reference; 0: no reference model is kept."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_placement: Literal["loss", "reward"] = "loss"
    entropy_coefficient: bounds.SignedCoefficient = 0.0
    aggregation: Literal["token-mean", "sequence-mean"] = "token-mean"


@section
class RewardsConfig:
    function: str | None = None
    """Function (prompt: Prompt, response: str) -> float: `package.module:name`, or `path/file.py:name` relative to the
    configuration's directory; default: the task's own scorer. docs/rewards.md describes its arguments."""
    import_path: bounds.Location | None = None
    """Directory whose modules `function` may import; default: the configuration's, or that of `path/file.py`."""
    pool: Literal["processes", "ray"] = "processes"
    """Where scorers run: beside the ranks, or on an existing Ray cluster (RAY_ADDRESS, else that of the rank's machine)."""
    num_workers: bounds.Few = 1
    """Scoring processes per decode replica; on Ray each has one CPU of the cluster reserved."""
    timeout_seconds: bounds.Seconds = 5.0
    """Time limit for scoring one response."""
    error_value: bounds.Reward = 0.0
    """Reward of a response whose scorer raised or timed out."""
    stop_when_all_fail: bool = True
    """Whether to end the run if no response of a step or an evaluation could be scored."""
    threshold: bounds.Reward | None = None
    """If set: reward 1 at or above it, else 0 (some scorers give garbage a little more than 0)."""


@section
class TaskConfig:
    name: str
    """A reasoning-gym task (`chain_sum`), or a name for a dataset file."""
    weight: bounds.Weight = 1.0
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the reasoning-gym task."""


@section
class DataConfig:
    kind: Literal["reasoning_gym", "chain_sum_cot", "file"] = "reasoning_gym"
    """`chain_sum_cot`: the demo's chain sums with written partial sums."""
    tasks: tuple[TaskConfig, ...] = ()
    train_files: tuple[bounds.Location, ...] = ()
    """`.jsonl`, `.json` (a list of rows), both also as `.gz`, or `.parquet`; for kind `file`."""
    test_files: tuple[bounds.Location, ...] = ()
    prompt_column: str = "prompt"
    """Column with text or chat messages (also as JSON text). A dotted name reads a field: `reward_model.ground_truth`."""
    answer_column: str = "answer"
    system_prompt: str | None = None
    instruction: str = "{prompt}"
    """Template of the user message; must contain {prompt}."""
    chat_template: bool = True
    """Whether to apply the tokenizer's chat template, if it has one."""
    date: bounds.Day | None = None
    """Date (`2026-11-30`) for chat templates that use one; default: the day on which the run began."""
    train_seed: bounds.Seed = 20_000_000
    train_size: bounds.Items = 1_000_000
    test_seed: bounds.Seed = 10_000_000
    test_size: bounds.Items = 200
    """Generated items are seeded by seed + index, so [seed, seed + size) of train and test must not overlap."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of kind `chain_sum_cot`: min_terms, continue_probability, max_terms."""


@section
class EvaluationConfig:
    interval: bounds.Interval = 0
    """Steps between held-out evaluations; one runs before the first and after the last step; 0: none."""
    num_prompts: bounds.Samples = 100
    """Largest number of prompts: a test file may have fewer."""
    samples_per_prompt: bounds.Samples = 1
    temperature: bounds.Temperature = 1.0


@section
class OptimizerConfig:
    lr: bounds.LearningRate = 1e-6
    min_lr: bounds.LeastLearningRate = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: bounds.Interval = 0
    weight_decay: bounds.Coefficient = 0.0
    adam_beta1: bounds.Decay = 0.9
    adam_beta2: bounds.Decay = 0.95
    adam_eps: bounds.Epsilon = 1e-8
    clip_grad: bounds.Norm = 1.0
    """Largest global gradient norm; 0: no clipping."""
    use_distributed_optimizer: bool = False


@section
class TrainConfig:
    steps: bounds.Steps = 100
    seed: bounds.Seed = 1234
    global_batch_size: bounds.Samples | None = None
    """Number of samples per optimizer step; default: all of a rollout (one on-policy update)."""
    max_tokens_per_micro_batch: bounds.Tokens = 4096
    """Largest number of padded tokens in one micro-batch."""
    recompute_granularity: Literal["full", "selective"] | None = None
    output_dir: bounds.Location = "runs/default"


@section
class SupervisedConfig:
    steps: bounds.Steps = 100
    batch_size: bounds.Samples = 64
    """Number of sequences per optimizer step."""


@section
class TrackingConfig:
    enabled: bool = True
    uri: str | None = None
    """URI of the MLflow store; default: a SQLite file in train.output_dir. Passwords must come from the environment."""
    experiment: str = "erollout"
    run_name: str | None = None
    num_sample_rollouts: bounds.Limit = 8
    """Number of rollouts written to the samples table at each evaluation."""
    system_metrics: bool = True


@section
class CheckpointConfig:
    directory: bounds.Location | None = None
    """Default: <train.output_dir>/checkpoints."""
    interval: bounds.Interval = 0
    """Steps between checkpoints; one is also saved at the end; 0: no checkpoints."""
    keep_last: bounds.Few = 2
    asynchronous: bool = False
    """Write in the background while training continues; each rank holds a copy of its state in host memory meanwhile."""
    resume: bool = True
    """Resume from the newest complete checkpoint in the directory, if there is one; false: refuse to start if there is."""
    export_path: bounds.Location | None = None
    """Directory for the final policy in Hugging Face's format."""


@section
class FaultToleranceConfig:
    heartbeat_seconds: bounds.Heartbeat = 5.0
    """Seconds between heartbeats of each rank (<train.output_dir>/heartbeats). At most 20."""
    hang_seconds: bounds.SecondsOrNever = 3600.0
    """Time in one phase after which a rank counts as hanging: the ranks that it waits for are reported, and the run ends. In
    rollouts and evaluations it is the time of one engine step, and of scoring after the last one. 0: never."""
    max_nonfinite_steps: bounds.Steps = 5
    """Number of updates in a row with a non-finite loss or gradient that ends the run, with the last batch saved."""
    checksum_interval: bounds.Interval = 100
    """Steps between comparisons of parameters across data-parallel ranks; 0: none."""


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
    """Read a YAML file, apply `key=value` overrides and validate. Raises UserError."""
    return _with_import_path(build_config(read_tree(path, overrides or [], Config), str(path)), Path(path).absolute().parent)


def _with_import_path(config: Config, directory: Path) -> Config:
    """Default rewards.import_path to the configuration's directory, wherever the run is started."""
    if config.rewards.function is None or config.rewards.import_path is not None:
        return config
    rewards = replace(config.rewards, import_path=str(directory))  # type: ignore[type-var]  # mypy does not see through section
    return replace(config, rewards=rewards)  # type: ignore[type-var]


def build_config(tree: dict[str, Any], source: str = "config") -> Config:
    """Validate a nested dict of sections. Raises UserError; `source` is named in the message."""
    try:
        config = _ADAPTER.validate_python(fit(tree, Config))
    except ValidationError as error:
        raise UserError(f"{source}: {describe(error, Config)}") from None
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
    if data.kind == "file" and not data.train_files:
        raise UserError("data.train_files is empty but data.kind = file; name at least one JSONL, JSON or parquet file")
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


def require_groups(config: Config) -> None:
    """Check, for training, that groups have several samples, which advantages need. Raises UserError."""
    if config.rollout.group_size == 1:
        raise UserError(
            f"rollout.group_size = 1: {config.algorithm.name.upper()} compares a response with the others to its prompt, and "
            "every advantage would be 0; set it to 2 or more (8 is the default)"
        )


def _check_coordinator(config: Config) -> None:
    if config.coordinator.lock_step and config.coordinator.policy != "cluster":
        raise UserError(
            f"coordinator.lock_step = True but coordinator.policy = {config.coordinator.policy}: replicas that share "
            "collectives need one state; set coordinator.policy to cluster"
        )
