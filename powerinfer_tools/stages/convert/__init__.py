"""convert: a plan's placement becomes a split file."""
