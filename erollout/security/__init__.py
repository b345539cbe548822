"""What keeps strangers out: restricted unpickling, and texts without credentials."""
