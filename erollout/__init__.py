"""RL post-training of language models on Megatron-core, with rollouts made fast without changing what is sampled.

`Engine` generates with a model; `load_config`, `train`, `supervised`, `evaluate`, `compare` and `export` are the commands as
functions; `find_policy` finds a run's checkpoint, for `Engine` and `evaluate`; `read_metrics` reads what a run has tracked.
They are loaded when first used: importing the package imports nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from erollout.api.commands import compare, evaluate, supervised, train
    from erollout.api.export import export
    from erollout.api.generation import GenerationEngine as Engine
    from erollout.checkpoint.saved_policy import find_policy
    from erollout.config import Config, load_config
    from erollout.errors import UserError
    from erollout.tracking.journal import read_metrics
    from erollout.types import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Engine",
    "SamplingParams",
    "UserError",
    "compare",
    "evaluate",
    "export",
    "find_policy",
    "load_config",
    "read_metrics",
    "supervised",
    "train",
]

_HOMES = {
    "Config": "config:Config",
    "Engine": "api.generation:GenerationEngine",
    "SamplingParams": "types:SamplingParams",
    "UserError": "errors:UserError",
    "compare": "api.commands:compare",
    "evaluate": "api.commands:evaluate",
    "export": "api.export:export",
    "find_policy": "checkpoint.saved_policy:find_policy",
    "load_config": "config:load_config",
    "read_metrics": "tracking.journal:read_metrics",
    "supervised": "api.commands:supervised",
    "train": "api.commands:train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), attribute)
