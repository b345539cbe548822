"""The `erollout` command: its commands, --dry-run and the demos."""
