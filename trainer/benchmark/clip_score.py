"""CLIP score: the cosine between a picture and its prompt, as OpenAI's CLIP sees them."""

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from maskunet_core.judges.clip import embedded
from maskunet_core.rewards.clip import ClipReward

from .suites import Prompt


class ClipScore:
    """digest: of CLIP's file."""

    real = None

    def __init__(self, name: str, clip: ClipReward, digest: str):
        self.name, self.clip = name, clip
        self.record = {"clip": digest, "version": 1}

    def __call__(self, pictures: Sequence[Image], prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        told = torch.stack([self.clip.feature(prompt.text) for prompt in prompts])
        return {"cosine": (embedded(self.clip, pictures) * told).sum(1)}
