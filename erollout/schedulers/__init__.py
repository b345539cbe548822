"""Interfaces to schedulers: Slurm and Ray."""
