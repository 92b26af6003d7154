"""Several servers of one model behind one address, on an engine that exists: Ray Serve."""
