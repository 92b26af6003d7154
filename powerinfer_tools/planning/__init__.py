"""The planner: what is where, in which mode, and what speed to expect (design: one level per layer)."""
