"""What programs use: an engine to generate with, and the commands as functions."""
