"""Building blocks of configurations: bounds of values, YAML, and command-line overrides."""
