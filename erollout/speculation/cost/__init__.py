"""Cost of a step: the roofline, measured ratios over it, and live corrections."""
