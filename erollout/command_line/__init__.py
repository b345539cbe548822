"""The `erollout` command: its commands, the page of --dry-run, the demos."""
