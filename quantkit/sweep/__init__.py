"""Many recipes tried on one model: a grid of cells, what they share, one table, and which of them are really better."""
