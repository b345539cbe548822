"""Security: restricted unpickling, and removal of credentials from texts."""
