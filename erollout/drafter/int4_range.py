"""Constants of the search for int4 ranges, shared by the ModelOpt path and the native one."""

CLIP_RATIOS = (0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
"""Ranges of the clip search, relative to a group's largest weight. The last one makes it never worse than no search."""
TINIEST = 2.0**-24
"""Largest weight up to which a group counts as zero, as in ModelOpt."""
