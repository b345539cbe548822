"""Rewards: scores for responses from scoring processes, which may hang or crash. Light: every scoring process imports it."""

from erollout.rewards.pool import RewardPool, ScoringCounts
from erollout.rewards.scorers import Scorer, build_scorer

__all__ = ["RewardPool", "Scorer", "ScoringCounts", "build_scorer"]
