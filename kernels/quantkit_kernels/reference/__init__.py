"""The plain-torch twins of every kernel, one file per op: what an unknown device gets, what tests trust."""
