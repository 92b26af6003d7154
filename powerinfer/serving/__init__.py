"""The server as an application of other programs."""
