"""Checkpoints: their state, the writer process, and the directory that holds them."""
