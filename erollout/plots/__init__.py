"""Every plot, in one style. Matplotlib is loaded when one is drawn."""
