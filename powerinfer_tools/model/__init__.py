"""Models as data: architectures, hyper-parameters, tensors, shapes, and reading them from files."""
