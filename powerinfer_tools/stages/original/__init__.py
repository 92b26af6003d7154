"""Files of the original PowerInfer, in and out: its models, its predictor and its activation folders."""
