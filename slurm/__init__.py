"""Batch files and examples of site settings, shipped with the package."""
