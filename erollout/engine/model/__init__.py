"""The decode model: inputs, layers and the kernels that run them."""
