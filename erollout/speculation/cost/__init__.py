"""What a step costs: the roofline, what was measured, and what live steps correct."""
