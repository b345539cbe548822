"""From logits to tokens: sampling, verification, stop strings."""
