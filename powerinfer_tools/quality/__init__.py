"""What a change costs: perplexity, comparison with another model, and the tasks of lm-eval."""
