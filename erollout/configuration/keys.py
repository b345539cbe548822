"""The configuration's sections but `speculation`: every key, its default (written here and nowhere else) and bounds. Pure."""

from dataclasses import field
from typing import Any, Literal

from erollout.configuration import bounds
from erollout.configuration.section import section


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
    """Ranks that share each layer while training."""
    pipeline_model_parallel_size: bounds.Ranks = 1
    """Ranks, one after the other, that share the layers while training. It must divide their number."""
    sequence_parallel: bool = False
    """Split the activations between tensor-parallel regions by sequence, which saves memory. Needs a tensor-parallel size
    above 1."""
    timeout_seconds: bounds.Timeout = 4500
    """Limit of any single collective. Longer than fault_tolerance.hang_seconds, which ends a run with a clearer message."""


@section
class RolloutConfig:
    prompts_per_step: bounds.Samples = 32
    """Prompts sampled in each step, by all replicas together."""
    group_size: bounds.Samples = 8
    """Responses sampled from each prompt."""
    tensor_model_parallel_size: bounds.Ranks = 1
    """Tensor-parallel size of a decode replica; the remaining ranks form further replicas."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the decode weights and the KV cache. bfloat16 has the fast CPU kernels; float32 keeps the mismatch with a
    float32 actor at rounding."""
    temperature: bounds.Temperature = 1.0
    """Divides the logits; 0: greedy, for evaluation only, because a group would sample the same response over and over."""
    top_k: bounds.Limit = 0
    """Sample from the k most likely tokens; 0: from all."""
    top_p: bounds.PositiveFraction = 1.0
    """Sample from the fewest tokens whose probabilities add up to this; 1: from all."""
    min_p: bounds.Fraction = 0.0
    """Sample from tokens with at least this share of the largest probability; 0: from all."""
    repetition_penalty: bounds.Penalty = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that the prompt or the response has already; 1: no
    penalty."""
    max_prompt_tokens: bounds.Tokens = 512
    """Longest prompt in tokens; a longer one is refused."""
    max_tokens: bounds.Tokens = 256
    """Longest response in tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a response once its decoded text contains them."""
    stop_token_ids: tuple[bounds.TokenId, ...] = ()
    """Ids that end a response, besides the model's end-of-sequence ids."""
    special_tokens: Literal["content", "all", "none"] = "content"
    """Special tokens kept in the text that is scored and searched for `stop`. `content`: all (`<answer>` may be one) except
    those that begin, end (including `stop_token_ids`) or pad a sequence; `all`: those too; `none`: none."""
    ignore_eos: bool = False
    """Sample past the end-of-sequence token, up to `max_tokens`: for benchmarks with fixed lengths."""
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
    """The algorithm: `grpo` (arXiv 2402.03300)."""
    clip_ratio_low: bounds.Fraction = 0.2
    """The probability ratio is clipped below at 1 minus this (GRPO's and PPO's epsilon)."""
    clip_ratio_high: bounds.Coefficient = 0.2
    """The ratio is clipped above at 1 plus this; higher than `clip_ratio_low`, as 0.28, it is DAPO's clip-higher (arXiv
    2503.14476)."""
    normalize_advantages: bool = True
    """Divide a group's advantages by its standard deviation."""
    kl_coefficient: bounds.Coefficient = 0.0
    """Coefficient of the KL to the reference; 0: no reference model is kept."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL to the reference per token: `k1` (unbiased, may be negative), `k2` (biased, its gradient is not),
    `k3` (unbiased, never negative, low variance)."""
    kl_placement: Literal["loss", "reward"] = "loss"
    """Whether the KL is added to the loss of each token (GRPO) or taken off the reward of each response (PPO's form)."""
    entropy_coefficient: bounds.SignedCoefficient = 0.0
    """Coefficient of the entropy bonus: taken off the loss of each token."""
    aggregation: Literal["token-mean", "sequence-mean"] = "token-mean"
    """`token-mean`: the mean over all response tokens of a batch, so that long responses weigh more (DAPO). `sequence-mean`:
    the mean over responses of each one's mean (GRPO)."""


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
    """Share of the prompts, relative to the other tasks'."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the reasoning-gym task."""


@section
class DataConfig:
    kind: Literal["reasoning_gym", "chain_sum_cot", "file"] = "reasoning_gym"
    """`chain_sum_cot`: the demo's chain sums with written partial sums."""
    tasks: tuple[TaskConfig, ...] = ()
    """reasoning-gym tasks, or names and weights of dataset files, in the order of `train_files`."""
    train_files: tuple[bounds.Location, ...] = ()
    """`.jsonl`, `.json` (a list of rows), both also as `.gz`, or `.parquet`; for kind `file`."""
    test_files: tuple[bounds.Location, ...] = ()
    """Held-out rows for `evaluation`, `erollout evaluate`, `rollout` and `compare`; the same formats."""
    prompt_column: str = "prompt"
    """Column with text or chat messages (also as JSON text). A dotted name reads a field: `reward_model.ground_truth`."""
    answer_column: str = "answer"
    """Column with the reference answer, of which the default scorer reads the final answer. A dotted name reads a field."""
    system_prompt: str | None = None
    """System message before every prompt, for chat templates that have one."""
    instruction: str = "{prompt}"
    """Template of the user message; must contain {prompt}."""
    chat_template: bool = True
    """Whether to apply the tokenizer's chat template, if it has one."""
    date: bounds.Day | None = None
    """Date (`2026-11-30`) for chat templates that use one; default: the day on which the run began."""
    train_seed: bounds.Seed = 20_000_000
    """Seed of the first generated training item."""
    train_size: bounds.Items = 1_000_000
    """Number of generated training items."""
    test_seed: bounds.Seed = 10_000_000
    """Seed of the first generated held-out item."""
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
    """Responses per prompt; above 1, `evaluation/pass_at_k` is tracked too."""
    temperature: bounds.Temperature = 1.0
    """Temperature of held-out rollouts; 0: greedy."""


@section
class OptimizerConfig:
    lr: bounds.LearningRate = 1e-6
    """Learning rate after warm-up (Megatron's Adam)."""
    min_lr: bounds.LeastLearningRate = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Decay from `lr` to `min_lr` over all updates of the run."""
    lr_warmup_steps: bounds.Interval = 0
    """Updates over which the rate rises linearly to `lr`."""
    weight_decay: bounds.Coefficient = 0.0
    """Decoupled weight decay (AdamW)."""
    adam_beta1: bounds.Decay = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: bounds.Decay = 0.95
    """Decay of Adam's second moment."""
    adam_eps: bounds.Epsilon = 1e-8
    """Added to the root of Adam's second moment."""
    clip_grad: bounds.Norm = 1.0
    """Largest global gradient norm; 0: no clipping."""
    use_distributed_optimizer: bool = False
    """Shard optimizer states and main parameters over data-parallel ranks (Megatron's ZeRO-1)."""


@section
class ProfileConfig:
    steps: tuple[bounds.Steps, ...] = ()
    """Numbers of steps that torch's profiler traces, as [10, 12], in which they take longer. Each rank writes a Chrome trace to
    <train.output_dir>/profile, with the phases of the step and of the engine as named ranges."""


@section
class TrainConfig:
    steps: bounds.Steps = 100
    """RL steps of the run: one rollout each."""
    seed: bounds.Seed = 1234
    """Seed of samples, data order and random weights. The same seed samples the same tokens; it can't be changed on resume."""
    global_batch_size: bounds.Samples | None = None
    """Number of samples per optimizer step; default: all of a rollout (one on-policy update)."""
    max_tokens_per_micro_batch: bounds.Tokens = 4096
    """Largest number of padded tokens in one micro-batch."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass to save memory: whole layers (`full`) or attention only (`selective`)."""
    output_dir: bounds.Location = "runs/default"
    """Directory of the run: checkpoints, journal, MLflow store, logs, decisions. One run at a time owns it."""
    save_rollouts: bool = False
    """Write every response of each step, with token ids and log-probs, to <train.output_dir>/rollouts, one JSON line each."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)


@section
class SupervisedConfig:
    steps: bounds.Steps = 100
    """Optimizer steps of `erollout sft`."""
    batch_size: bounds.Samples = 64
    """Number of sequences per optimizer step."""


@section
class TrackingConfig:
    enabled: bool = True
    """Track the run in MLflow. The journal in <train.output_dir>/tracking is written either way."""
    uri: str | None = None
    """URI of the MLflow store; default: a SQLite file in train.output_dir. Passwords must come from the environment."""
    experiment: str = "erollout"
    """MLflow experiment; made if it is not there."""
    run_name: str | None = None
    """Name of the MLflow run; default: MLflow's own."""
    num_sample_rollouts: bounds.Limit = 8
    """Number of responses written to the samples table at each evaluation, and at each step that is due."""
    train_samples_interval: bounds.Interval = 0
    """Steps between two whose training responses go to the samples table too; 0: none."""
    system_metrics: bool = True
    """Track processor, memory, disk, network and GPU of rank 0's machine."""
    figures: bool = True
    """Draw figures of the rollout at each evaluation and at the end, and the curves of the run. They take a second or two."""


@section
class CheckpointConfig:
    directory: bounds.Location | None = None
    """Default: <train.output_dir>/checkpoints."""
    interval: bounds.Interval = 0
    """Steps between checkpoints; one is also saved at the end; 0: no checkpoints."""
    keep_last: bounds.Few = 2
    """Newest complete checkpoints to keep; older ones are removed."""
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
