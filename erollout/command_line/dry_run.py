"""Output of `--dry-run`: layouts, sizes, memory, paths and data of a run, also for a model that is not fetched yet."""

from pathlib import Path

from erollout.checkpoint.resume import RunKind
from erollout.config import Config, TrackingConfig
from erollout.configuration.hub import fetch_line
from erollout.configuration.speculation import SpeculationConfig
from erollout.drafter.registry import proposer_kind
from erollout.policy.families import published_architecture
from erollout.security.redaction import redact
from erollout.tracking.address import has_own_store, store_uri, uri_source
from erollout.training.preflight import Resolved, Sizes, check_places, preflight, work_out

_SHOWN = 16
"""Largest number of replicas listed."""
_WIDTH = 19
_TEXT = 300
"""Longest prompt shown, in characters."""


def dry_run(config: Config, kind: RunKind | None = None) -> str:
    """Check all existing inputs and print what the run would do. Raises UserError.

    kind: as in preflight.
    """
    rolls_out = kind != "supervised"
    path = config.model.path
    published = published_architecture(path) if path is not None and not Path(path).exists() else None
    if path is None or published is None:
        resolved = preflight(config, kind)
        return "\n".join([*_describe(config, resolved, rolls_out), *_lines(_items(config, resolved, kind))])
    sizes = work_out(config, published, rolls_out)
    if kind is not None:
        check_places(config)
    note = f"weights, tokenizer, data and scorer: model.path = {path} is not there; {fetch_line('model.path', path)}"
    missing = [file for file in (*config.data.train_files, *config.data.test_files) if not Path(file).exists()]
    more = [f"{'':<{_WIDTH}}  {file} is not there either" for file in missing]
    return "\n".join([*_describe(config, sizes, rolls_out), f"{'not checked':<{_WIDTH}}  {note}", *more])


def _describe(config: Config, sizes: Sizes, rolls_out: bool) -> list[str]:
    train, architecture = sizes.train, sizes.architecture
    interval = config.checkpoint.interval
    lines = {
        "model": f"{architecture.family}, {architecture.num_parameters():,} parameters, {architecture.num_layers} layers",
        "training": f"{train.world_size} ranks = tensor {train.tensor} x data {train.data} x pipeline {train.pipeline}",
        **(_rollouts(config, sizes) if rolls_out else _supervised(config, sizes)),
        "output": config.train.output_dir,
        "tracking": _tracking(config.tracking, config.train.output_dir),
        "checkpoints": f"{config.checkpoint_directory} every {interval} steps" if interval else "none",
        **(_replicas(sizes) if rolls_out else {}),
    }
    return _lines(lines)


def _lines(values: dict[str, str]) -> list[str]:
    return [f"{name:<{_WIDTH}}  {value}" for name, value in values.items()]


def _items(config: Config, resolved: Resolved, kind: RunKind | None) -> dict[str, str]:
    """Amount of data, the first item as the model reads it, and the reward function."""
    train, test = resolved.train_data, resolved.test_data
    noun = "row" if config.data.kind == "file" else "generated item"
    amounts = f"{_count(len(test), noun) if test is not None else 'none'} to test on"
    shown = test if kind is None and test is not None else train
    first = len(train) - 1 if kind == "supervised" else 0
    prompt = shown.prompt(first)
    lines = {
        "data": amounts if kind is None else f"{_count(len(train), noun)} to train on, {amounts}",
        "first prompt": f"{_beginning(prompt.text)}, {_count(len(prompt.prompt_ids), 'token')}",
    }
    if kind == "supervised":
        return lines | {"its solution": _beginning(train.solution(first) or "")}
    record = prompt.item.get("entry", prompt.item)
    scorer = resolved.scorer
    least = "" if scorer.threshold is None else f", 1 from {scorer.threshold:g} on, else 0"
    return lines | {"its reference": _beginning(str(record.get("answer", ""))), "reward function": f"{scorer.function}{least}"}


def _beginning(text: str) -> str:
    """The beginning of a text on one line, with special characters written out."""
    return repr(text[:_TEXT]) + (" ..." if len(text) > _TEXT else "")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _rollouts(config: Config, sizes: Sizes) -> dict[str, str]:
    rollout, decode = config.rollout, sizes.decode
    batch = config.train.global_batch_size or config.samples_per_step
    return {
        "decoding": f"{_count(decode.replicas, 'replica')} of {_count(decode.tensor, 'rank')}",
        "step": f"{rollout.prompts_per_step} prompts x {rollout.group_size} responses, "
        f"{_count(config.samples_per_step // batch, 'optimizer step')} of {_count(batch, 'sample')}",
        "parameters per rank": f"{sizes.trained_parameters:,} trained, {sizes.decoded_parameters:,} decoded",
        "memory per rank": f"{_gib(sizes.training_bytes)} training state, {_gib(sizes.decoding_bytes)} rollout "
        f"(weights + KV cache), activations of {config.train.max_tokens_per_micro_batch} tokens",
        "speculation": _speculation(config.speculation),
    }


def _supervised(config: Config, sizes: Sizes) -> dict[str, str]:
    return {
        "step": f"{config.supervised.batch_size} sequences, {config.supervised.steps} times",
        "parameters per rank": f"{sizes.trained_parameters:,} trained",
        "memory per rank": f"{_gib(sizes.training_bytes)} training state, activations of "
        f"{config.train.max_tokens_per_micro_batch} tokens",
    }


def _replicas(sizes: Sizes) -> dict[str, str]:
    decode = sizes.decode
    shown = {
        f"decode replica {i}": f"ranks {', '.join(map(str, decode.ranks(i)))}" for i in range(min(decode.replicas, _SHOWN))
    }
    more = decode.replicas - len(shown)
    return shown | ({"": f"and {more} more replicas"} if more else {})


def _tracking(options: TrackingConfig, output_dir: str) -> str:
    if not options.enabled:
        return "off"
    if has_own_store(options):
        return f"SQLite in {output_dir}"
    return f"{redact(store_uri(options, output_dir))} ({uri_source(options)})"


def _speculation(options: SpeculationConfig) -> str:
    if options.mode == "off":
        return "off"
    longest = options.toggle.max_speculative_tokens
    lengths = {"adaptive": f"up to {longest}", "ladder": f"one of {options.toggle.ladder.rungs}"}
    tokens = lengths.get(options.mode, str(options.num_speculative_tokens))
    costs = "" if options.mode == "always" else f", costs {options.calibration or 'measured at the start'}"
    return f"{options.mode}, {tokens} tokens, {options.verification}, {proposer_kind(options).summary(options)}{costs}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
