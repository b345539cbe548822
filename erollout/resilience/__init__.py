"""Tolerance of preemption, failures and time limits: signals, stop requests, heartbeats."""
