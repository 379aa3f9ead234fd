"""Sizes, disk and memory of a run before it starts, and how it stays within a budget; without torch."""
