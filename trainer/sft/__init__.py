"""Supervised training: rows in shuffled epochs, one optimizer step for each batch of them."""
