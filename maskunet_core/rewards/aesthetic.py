"""LAION's aesthetic predictor: a linear head on the embeddings of OpenAI's CLIP ViT-L/14. It reads no prompt.

Its published file, `sac+logos+ava1-l14-linearMSE.pth`, holds the head alone.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clip import ImageTower
from .layers import LinearChain, fill
from .preprocess import normalise
from .reward import BoundModel, BoundReward, Reward


class AestheticReward(Reward):
    """Scores of about 1 to 10, whatever the prompt."""

    def __init__(self, name: str, tower: ImageTower, head: LinearChain):
        self.name = name
        self.model = nn.ModuleDict({"tower": tower, "head": head})

    @classmethod
    def from_tensors(
        cls,
        name: str,
        head: Mapping[str, Tensor],
        tower: ImageTower,
    ) -> "AestheticReward":
        """head: tensors of the predictor's file; tower: of OpenAI's CLIP ViT-L/14."""
        with torch.device("meta"):
            chain = LinearChain(head)
        return cls(name, tower, fill(chain, head, torch.float32))

    def bind(self, prompt: str) -> BoundReward:
        return BoundModel(self.name, self.model["tower"].size, self.model, self._score)

    def _score(self, pictures: Tensor) -> Tensor:
        seen = F.normalize(self.model["tower"](normalise(pictures)).float(), dim=-1)
        return self.model["head"](seen).squeeze(1)

    def modules(self) -> list[nn.Module]:
        return [self.model]
