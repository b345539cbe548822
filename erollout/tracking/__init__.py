"""Tracking: a local journal of all metrics, delivered to MLflow, and the console."""
