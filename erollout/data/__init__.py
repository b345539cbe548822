"""Tasks and datasets as tokenized prompts by index."""

from erollout.data.build import build_datasets
from erollout.data.prompts import PromptDataset, PromptLimits

__all__ = ["PromptDataset", "PromptLimits", "build_datasets"]
