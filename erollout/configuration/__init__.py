"""What a configuration is made of: bounds of values, the YAML and the options they are read from."""
