"""What proposes draft tokens."""
