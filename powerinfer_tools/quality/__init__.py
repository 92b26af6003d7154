"""The cost of a change in quality: perplexity, comparison with another model, and the tasks of lm-eval."""
