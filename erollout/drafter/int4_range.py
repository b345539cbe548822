"""Constants of the search for int4 ranges, shared by the ModelOpt path and the native one."""

CLIP_RATIOS = (0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
"""Ranges that the clip search tries, in parts of a group's largest weight. With the last, it never loses against no search."""
TINIEST = 2.0**-24
"""A group whose largest weight is not above this counts as zero, as in ModelOpt."""
