"""Random streams that depend on what they are for, never on what ran before."""

import torch


def seeded(*keys: int) -> torch.Generator:
    """A generator whose state depends on all keys: purpose, seed, step."""
    state = 0
    for key in keys:
        state = (state * 1_000_003 + key + 1) % (1 << 62)
    return torch.Generator().manual_seed(state)
