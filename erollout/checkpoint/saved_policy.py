"""The policy in a run's checkpoint, found by the run's directory, with the configuration that it was saved with. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erollout.checkpoint.manifest import STATE, complete_checkpoints
from erollout.checkpoint.resume import OBEYED, REFUSED, UNREAD, read_state, require_model
from erollout.config import Config, build_config, load_config
from erollout.configuration.renamed import present_name
from erollout.configuration.yaml_tree import apply_override, joined
from erollout.errors import UserError
from erollout.policy.architecture import Architecture, RopeScaling
from erollout.policy.families import FAMILIES, hf_config, policy_architecture
from erollout.tracking.journal import journal_path


@dataclass(frozen=True, slots=True)
class SavedPolicy:
    """A checkpoint to sample from or to export."""

    path: Path
    """Directory of the checkpoint."""
    step: int
    """Number of steps that the policy has been trained for."""
    config: Config
    """The run's, with `model.architecture` instead of `model.path`: the weights are the checkpoint's.

    Tokenizer, test files and reward function are read where the run read them; overrides of `find_policy` name other places.
    """


def find_policy(run: str | Path, step: int | None = None, overrides: Sequence[str] = ()) -> SavedPolicy:
    """The policy of a run's checkpoint after `step` steps, or of its newest one.

    Args:
        run: `train.output_dir` of the run.
        overrides: `key=value` for keys that are to differ from the run's.

    Raises UserError for a directory without a run or checkpoint, and for an unknown step, with those that exist.
    """
    directory = Path(run).expanduser().absolute()
    by_step = {int(path.name.removeprefix("step_")): path for path in _checkpoints(directory)}
    if step is not None and step not in by_step:
        raise UserError(f"--step = {step}: {run} has no checkpoint of that step; there are {', '.join(map(str, by_step))}")
    found = max(by_step) if step is None else step
    path = by_step[found]
    document = read_state(path)
    config = _configuration(path, document, directory, overrides)
    require_model(path, document, policy_architecture(config.model), config)
    return SavedPolicy(path, found, config)


def config_file(run: Path) -> Path | None:
    """The configuration in a run's directory: what a launcher submitted, else what the run itself wrote; None: neither."""
    return next((path for path in (run / "config.yaml", journal_path(run).with_name("config.yaml")) if path.is_file()), None)


def _checkpoints(run: Path) -> list[Path]:
    """A run's complete checkpoints, of which there is at least one. Raises UserError."""
    if not run.is_dir():
        raise UserError(f"--run = {run} is no directory; name the train.output_dir of a run")
    if found := complete_checkpoints(run / "checkpoints"):
        return found
    file = config_file(run)
    if file is None and not journal_path(run).is_file():
        raise UserError(f"--run = {run} holds no run; name the train.output_dir of one")
    if file is not None and (found := complete_checkpoints(load_config(file).checkpoint_directory)):
        return found
    raise UserError(f"--run = {run} has no checkpoint; checkpoint.interval = N saves one every N steps and at the end")


def _configuration(path: Path, document: Mapping[str, Any], run: Path, overrides: Sequence[str]) -> Config:
    """The configuration in a checkpoint's STATE file, with the checkpoint's model and the run where it is now."""
    if "configuration" not in document:
        raise UserError(f"checkpoint {path} is of a version that saved no configuration; resume the run to save another one")
    tree: dict[str, Any] = {}
    known = {f"{section}.{name}" for section, names in OBEYED.items() for name in names.split()} | {*REFUSED, *UNREAD}
    for key, value in document["configuration"].items():
        if present_name(key) not in known:  # as when a run resumes: keys of other versions are ignored
            continue
        *sections, name = present_name(key).split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    model = tree["model"]
    model["tokenizer"] = model.get("tokenizer") or model.get("path")
    model |= {"path": None, "architecture": hf_config(_architecture(path, document), model["dtype"])}
    tree["data"]["date"] = tree["data"].get("date") or document.get("date")
    tree["train"]["output_dir"] = str(run)
    tree["checkpoint"]["export_path"] = None
    for override in joined(overrides):
        apply_override(tree, override, Config)
    return build_config(tree, str(path / STATE))


def _architecture(path: Path, document: Mapping[str, Any]) -> Architecture:
    sizes = dict(document["identity"]["architecture"])
    try:
        scaling = sizes.pop("rope_scaling")
        return Architecture(
            **sizes | {"eos_token_ids": tuple(sizes["eos_token_ids"])},
            rope_scaling=RopeScaling(**scaling) if scaling else None,
            layer=FAMILIES[sizes["family"]].layer,
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path} is damaged: {STATE} describes no model ({error}); name another --step") from error
