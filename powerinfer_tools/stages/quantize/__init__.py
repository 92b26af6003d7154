"""quantize: a model with its matrices in another row type."""
