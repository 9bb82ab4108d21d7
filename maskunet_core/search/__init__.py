"""Masks without training (algorithm 1): found while an image is sampled, by the gradients of rewards."""
