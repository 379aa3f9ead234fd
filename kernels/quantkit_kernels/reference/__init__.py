"""The plain-torch twins of every kernel, one file per op: used on unknown devices, and what the tests compare with."""
