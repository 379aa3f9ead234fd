"""Grids, range search and the two values every room exchanges: `QuantizedWeight` and `Statistics`."""
