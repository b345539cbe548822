"""Tracking: a local journal of every figure, delivered to MLflow; the console; figures."""
