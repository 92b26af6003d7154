"""The stages of the pipeline, one folder a command."""
