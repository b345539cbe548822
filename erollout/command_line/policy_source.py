"""What `evaluate` and `rollout` sample from: a configured model, a Hugging Face directory, or a run's checkpoint."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erollout.config import Config, build_config, load_config, without_training_data
from erollout.configuration.arguments import add_overrides, add_step
from erollout.configuration.yaml_tree import apply_override, joined
from erollout.errors import UserError

if TYPE_CHECKING:
    from erollout.checkpoint.saved_policy import SavedPolicy

_ALL = 10**7
"""More prompts than a test file has."""


@dataclass(frozen=True, slots=True)
class PolicySource:
    config: Config
    saved: "SavedPolicy | None" = None
    """The checkpoint to sample from; None: the configured model."""


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the choice of policy and test data."""
    parser.add_argument("--config", metavar="FILE", help="YAML file: data, reward and, without --model, the model")
    parser.add_argument("--model", metavar="DIR", help="Hugging Face directory to sample from")
    parser.add_argument("--run", dest="directory", metavar="DIR", help="train.output_dir of a run: sample from its checkpoint")
    add_step(parser)
    parser.add_argument(
        "--test", nargs="+", metavar="FILE", default=(), help="test rows instead of the configured ones: all are sampled"
    )
    add_overrides(parser)


def read_policy(options: argparse.Namespace) -> PolicySource:
    """What the options name. Raises UserError."""
    _check(options)
    words = joined(options.test)
    files = list(takewhile(lambda word: not _is_override(word), words))  # --test takes all words that follow
    named = [*_test_data(files), *_model(options.model), *words[len(files) :], *options.overrides]
    if options.directory is not None:
        from erollout.checkpoint.saved_policy import find_policy

        saved = find_policy(options.directory, options.step, named)
        saved = replace(saved, config=without_training_data(saved.config))
        return PolicySource(saved.config, saved)
    if options.config is not None:
        return PolicySource(without_training_data(load_config(options.config, named)))
    tree: dict[str, Any] = {}
    for override in joined(named):
        apply_override(tree, override, Config)
    return PolicySource(build_config(tree, "command line"))


def _check(options: argparse.Namespace) -> None:
    given = [f"--{name}" for name in ("config", "model") if getattr(options, name) is not None]
    if options.directory is not None and given:
        raise UserError(f"--run and {' and '.join(given)} are given, but a run has its own configuration and policy; give one")
    if options.directory is None and options.step is not None:
        raise UserError(f"--step = {options.step} is the step of a run's checkpoint; give --run DIR too")
    if options.directory is None and not given:
        raise UserError("no policy is named; give --run DIR, --model DIR or --config FILE")
    if options.directory is None and options.config is None and not options.test:
        raise UserError("--model needs test data; give --config FILE, which names them and the reward, or --test FILE")


def _is_override(word: str) -> bool:
    """Whether a word is `section.key=value`, and no file."""
    key, equals, _ = word.partition("=")
    return bool(equals) and "." in key and key.partition(".")[0] in Config.__annotations__


def _test_data(files: Sequence[str]) -> list[str]:
    """Overrides for test rows of these files."""
    if not files:
        return []
    rows = f"data.test_files={json.dumps(files, ensure_ascii=False)}"
    return ["data.kind=file", rows, "data.train_files=[]", "data.tasks=[]", "data.args={}", f"evaluation.num_prompts={_ALL}"]


def _model(directory: str | None) -> list[str]:
    """Overrides for the model of a Hugging Face directory, with its own tokenizer if it has one."""
    if directory is None:
        return []
    own = any(Path(directory).expanduser().glob("tokenizer*"))
    path = f"model.path={json.dumps(directory, ensure_ascii=False)}"
    return [path, "model.architecture=null", "checkpoint.export_path=null", *(["model.tokenizer=null"] if own else [])]
