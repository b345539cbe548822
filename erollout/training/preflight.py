"""Preflight: checks of a run, and its sizes, before a process group starts."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from itertools import chain
from math import prod
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from erollout.calibration.file import Identity, calibration_of_run
from erollout.calibration.model_size import describe_shape
from erollout.checkpoint.manifest import complete_checkpoints
from erollout.checkpoint.resume import RunKind, check_newest
from erollout.checkpoint.run_lock import LOCK
from erollout.config import Config, ModelConfig, RewardsConfig, RolloutConfig
from erollout.configuration.speculation import SpeculationConfig
from erollout.data.datasets import build_datasets
from erollout.data.prompts import PromptDataset, PromptLimits
from erollout.data.tokenizer import load_tokenizer
from erollout.drafter.registry import proposer_kind
from erollout.engine.kv_cache import num_blocks, num_bytes
from erollout.engine.model.decode_layout import decode_placement
from erollout.errors import UserError
from erollout.parallel.groups import current_rank, expected_world_size, resolve_layouts
from erollout.parallel.layout import DecodeLayout, TrainLayout
from erollout.parallel.placement import Placement
from erollout.policy.architecture import Architecture
from erollout.policy.families import policy_architecture
from erollout.policy.hf_export import check_destination
from erollout.policy.hf_io import check_weights
from erollout.policy.training_layout import training_placement
from erollout.resilience.stopping import VERDICT
from erollout.rewards.probe import ScorerProbe
from erollout.rewards.scorers import Scorer, build_scorer
from erollout.schedulers.ray_cluster import find_cluster
from erollout.tracking.address import has_own_store, store_uri, uri_source
from erollout.tracking.store import MlflowStore

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Layouts and sizes that follow from configuration and architecture."""

    architecture: Architecture
    train: TrainLayout
    decode: DecodeLayout
    trained_parameters: int
    """Number of parameters on the rank with the most."""
    decoded_parameters: int
    training_bytes: int
    """Bytes of weights, float32 gradients and Adam's state on the rank with the most, without activations."""
    decoding_bytes: int
    """Bytes of decode weights and KV cache of one rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved(Sizes):
    """What the configuration resolves to in this world."""

    tokenizer: PreTrainedTokenizerBase
    train_data: PromptDataset
    test_data: PromptDataset | None
    scorer: Scorer


def preflight(config: Config, kind: RunKind | None = None, scores: bool = True) -> Resolved:
    """Check model, tokenizer, layouts, data, scorer and tracking store. Raises UserError for the first error.

    Args:
        kind: kind of a run with checkpoints; a supervised one needs no scorer, and no room for responses. None: no such run.
        scores: whether rank 0 tests the scorer; False if another process has done so.
    """
    rolls_out = kind != "supervised"
    architecture = policy_architecture(config.model)
    sizes = work_out(config, architecture, rolls_out)
    tokenizer = load_tokenizer(config.tokenizer_path, architecture.vocab_size)
    if rolls_out:
        _check_pool(config.rewards)
    if config.model.path is not None:
        check_weights(config.model.path, architecture)
    if kind is not None:
        _check_export(config)
        check_places(config)
        check_newest(architecture, config, kind)
        _check_profile(config, kind)
    scorer = build_scorer(config.rewards, config.data)
    with _probe(scorer, config.rewards, rolls_out and scores) as probe:
        train_data, test_data = build_datasets(
            config.data, prompt_limits(config.model, config.rollout, architecture), tokenizer
        )
        _check_first_items(train_data, test_data, rolls_out)
        if probe is not None:
            is_built_in = config.data.kind == "file" and config.rewards.function is None
            _check_scorer(probe, train_data, test_data, reads_references=is_built_in)
    if kind is not None:
        _check_store(config)
    return Resolved(
        **{field.name: getattr(sizes, field.name) for field in fields(sizes)},
        tokenizer=tokenizer,
        train_data=train_data,
        test_data=test_data,
        scorer=scorer,
    )


def work_out(config: Config, architecture: Architecture, rolls_out: bool = True) -> Sizes:
    """Layouts and sizes. Raises UserError if they don't fit the architecture or each other."""
    train, decode = resolve_layouts(config, expected_world_size(config.parallel))
    if rolls_out:
        _check_context(prompt_limits(config.model, config.rollout, architecture), config.rollout)
        _check_stop_ids(config.rollout, architecture)
        _check_cache(config.rollout, architecture)
    with _named(f"parallel.tensor_model_parallel_size = {train.tensor}, pipeline_model_parallel_size = {train.pipeline}"):
        trained = max(_parameters(training_placement(architecture, train, rank)) for rank in _distinct_ranks(train))
    with _named(f"rollout.tensor_model_parallel_size = {decode.tensor}"):
        decoded_placement = decode_placement(architecture, decode.tensor, 0)
        decoded = _parameters(decoded_placement)
    if rolls_out:
        _check_drafter(config.speculation, decoded_placement)
        _check_calibration(config.speculation, config.rollout, architecture)
    return Sizes(
        architecture=architecture,
        train=train,
        decode=decode,
        trained_parameters=trained,
        decoded_parameters=decoded,
        training_bytes=trained
        * _training_bytes_per_parameter(config.model.dtype, config.optimizer.use_distributed_optimizer, train),
        decoding_bytes=decoded * _BYTES[config.rollout.dtype] + num_bytes(config.rollout, architecture),
    )


@contextmanager
def _named(keys: str) -> Iterator[None]:
    """Context that adds the responsible keys to errors of a layout that does not fit the model."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{keys}: {error}") from error


def prompt_limits(model: ModelConfig, rollout: RolloutConfig, architecture: Architecture) -> PromptLimits:
    context = model.max_position_embeddings or architecture.max_position_embeddings
    return PromptLimits(rollout.max_prompt_tokens, context)


def _check_context(limits: PromptLimits, rollout: RolloutConfig) -> None:
    """Check that prompt and response together fit the model's context."""
    wanted = rollout.max_prompt_tokens + rollout.max_tokens
    if wanted > limits.context_tokens:
        raise UserError(
            f"rollout.max_prompt_tokens + rollout.max_tokens = {wanted} exceed the context of {limits.context_tokens} tokens; "
            "lower one"
        )


def _check_stop_ids(rollout: RolloutConfig, architecture: Architecture) -> None:
    for token_id in rollout.stop_token_ids:
        if token_id >= architecture.vocab_size:
            raise UserError(
                f"rollout.stop_token_ids = {token_id} is none of the model's {architecture.vocab_size} tokens; remove it"
            )


def _check_cache(rollout: RolloutConfig, architecture: Architecture) -> None:
    """Check that the KV cache holds one response; prompts are checked by the engine."""
    blocks = num_blocks(rollout, architecture)
    needed = -(-rollout.max_tokens // rollout.block_size)
    if needed > blocks:
        raise UserError(
            f"rollout.max_tokens = {rollout.max_tokens} need {needed} KV blocks of a response but the pool has {blocks}; raise "
            "rollout.kv_cache_gib or rollout.num_kv_blocks"
        )


def _check_drafter(options: SpeculationConfig, placement: Placement) -> None:
    """Check that the proposer's drafters can be made, of a decode rank's shards."""
    if options.mode != "off":
        proposer_kind(options).check(options, placement)


def _check_calibration(options: SpeculationConfig, rollout: RolloutConfig, architecture: Architecture) -> None:
    """Check that a configured calibration is readable and is for this model, layout and drafters; ranks check the hardware."""
    if options.calibration is None or options.mode == "off":
        return
    calibration_of_run(
        options.calibration,
        lambda found: Identity(
            describe_shape(architecture),
            found.identity.hardware,
            rollout.tensor_model_parallel_size,
            tuple(proposer_kind(options).drafters(options)),
            rollout.dtype,
        ),
    )


def _check_first_items(train_data: PromptDataset, test_data: PromptDataset | None, rolls_out: bool) -> None:
    """Check the first items, which are otherwise created and tokenized on demand: a task that the tokenizer can't encode, or
    that lacks solutions to learn from, shows in them.
    """
    train_data.prompt(0)
    if test_data is not None:
        test_data.prompt(0)
    if not rolls_out:
        train_data.supervised_example(0)


def _probe(scorer: Scorer, options: RewardsConfig, scores: bool) -> AbstractContextManager[ScorerProbe | None]:
    """Start the scorer's probe, which loads the scorer while the data is read."""
    return ScorerProbe(scorer, options.timeout_seconds) if scores and current_rank() == 0 else nullcontext()


def _check_scorer(
    probe: ScorerProbe, train_data: PromptDataset, test_data: PromptDataset | None, reads_references: bool
) -> None:
    """Let the scorer score the first item and, if `reads_references`, read as many reference answers as time allows."""
    probe.require_scores(train_data.prompt(0), train_data.solution(0))
    if reads_references:
        probe.require_readable(chain.from_iterable(data.unrendered() for data in (train_data, test_data) if data is not None))


def _check_pool(options: RewardsConfig) -> None:
    """Check the Ray cluster before models are loaded; each rank that scores joins it later."""
    if options.pool == "ray" and current_rank() == 0:
        find_cluster("auto", "rewards.pool = ray")


def _check_profile(config: Config, kind: RunKind) -> None:
    """Check that the run makes the steps that are to be profiled."""
    key, last = ("supervised.steps", config.supervised.steps) if kind == "supervised" else ("train.steps", config.train.steps)
    for step in config.train.profile.steps:
        if step > last:
            raise UserError(f"train.profile.steps = {step} is no step of the run, which has {key} = {last}; lower it")


def _check_store(config: Config) -> None:
    """Check that a new run's tracking store answers; a resumed run keeps its records until the store is back."""
    resumes = config.checkpoint.resume and complete_checkpoints(config.checkpoint_directory)
    if current_rank() == 0 and config.tracking.enabled and not has_own_store(config.tracking) and not resumes:
        MlflowStore(store_uri(config.tracking, config.train.output_dir), uri_source(config.tracking)).check()


def _check_export(config: Config) -> None:
    """Check that the export, which replaces its directory, does not replace one that the run reads."""
    export = config.checkpoint.export_path
    sources = {"model.path": config.model.path, "model.tokenizer": config.model.tokenizer}
    for key, source in sources.items():
        if export and source and Path(export).resolve() == Path(source).resolve():
            raise UserError(f"checkpoint.export_path = {export} is also {key}; choose another directory")
    if export:
        check_destination(Path(export), Path(config.tokenizer_path))


def check_places(config: Config) -> None:
    """Check that all outputs can be written, before the first checkpoint needs it."""
    require_writable("train.output_dir", Path(config.train.output_dir))
    for name in (VERDICT, LOCK):
        if (file := Path(config.train.output_dir) / name).is_dir():
            raise UserError(f"train.output_dir: {file} is a directory, where a run leaves a file; move it away")
    if config.checkpoint.interval:
        require_writable("checkpoint.directory", config.checkpoint_directory)
    if config.checkpoint.export_path:
        require_writable("checkpoint.export_path", Path(config.checkpoint.export_path).parent)


def require_writable(key: str, directory: Path) -> None:
    """Raise UserError unless the directory exists or can be created, and is writable. Creates nothing."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{key} = {directory} can't be a directory: {there} is a file; choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key} = {directory} can't be written: no permission in {there}; choose another place")


def _distinct_ranks(layout: TrainLayout) -> tuple[int, ...]:
    """One rank for every different shard."""
    return layout.model_replica(0)


def _parameters(placement: Placement) -> int:
    return sum(prod(tensor.shape) for tensor in placement)


def _training_bytes_per_parameter(dtype: str, is_distributed: bool, train: TrainLayout) -> int:
    """Weights, float32 gradient, two Adam moments and, for bfloat16, a float32 main copy."""
    weights = _BYTES[dtype]
    optimizer = 8 + (4 if dtype == "bfloat16" else 0)
    if is_distributed:
        optimizer = -(-optimizer // train.data)
    return weights + 4 + optimizer


def resolved_facts(resolved: Resolved) -> dict[str, str | int | float]:
    """Facts tracked besides the configuration."""
    return {
        "world_size": resolved.train.world_size,
        "data_parallel_size": resolved.train.data,
        "decode_replicas": resolved.decode.replicas,
        "parameters": resolved.architecture.num_parameters(),
        "trained_parameters_per_rank": resolved.trained_parameters,
        "decoded_parameters_per_rank": resolved.decoded_parameters,
    }
