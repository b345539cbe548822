"""Scores for responses, from processes that may hang or crash. Light to import: every scoring process does."""

from erollout.rewards.pool import RewardPool, ScoringCounts
from erollout.rewards.scorers import Scorer, build_scorer

__all__ = ["RewardPool", "Scorer", "ScoringCounts", "build_scorer"]
