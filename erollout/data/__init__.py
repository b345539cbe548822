"""Tasks and datasets as tokenized prompts by index."""

from erollout.data.datasets import build_datasets
from erollout.data.prompts import PromptDataset, PromptLimits

__all__ = ["PromptDataset", "PromptLimits", "build_datasets"]
