"""A page on recorded runs: one HTML file with everything in it."""
