"""Models and weights that are made up: real shapes, random values, for measuring speed."""
