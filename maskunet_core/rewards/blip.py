"""ImageReward v1.0 (Xu et al., 2023, arXiv 2304.05977): BLIP's image encoder, BERT that looks at it, a linear head.

Parameters have the names of the published file, `ImageReward.pt`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .blip_layers import ImageEncoder, TextEncoder
from .layers import LinearChain, fill, heads_of
from .preprocess import normalise
from .reward import BoundModel, BoundReward, Reward
from .tokens import bert_tokens

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw scores on ImageReward's validation set: a published score is in these units."""


class ImageReward(Reward):
    def __init__(self, name: str, model: "ImageRewardModel"):
        self.name, self.model = name, model

    @classmethod
    def from_tensors(
        cls,
        name: str,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        *,
        checkpointing: bool = False,
        heads: tuple[int, int] | None = None,
    ) -> "ImageReward":
        """tensors: of the file. heads: of the image and the text encoder, where they do not follow from the widths."""
        with torch.device("meta"):
            model = ImageRewardModel(tensors, heads)
        fill(model, tensors, dtype)
        fill(model.mlp, tensors, torch.float32, "mlp.")
        model.checkpointing = checkpointing
        return cls(name, model)

    def bind(self, prompt: str) -> BoundReward:
        ids, mask = bert_tokens(prompt)
        # No other token looks at padding, and none of it reaches the score.
        ids = ids[None, mask.bool()]

        def score(pictures: Tensor) -> Tensor:
            nonlocal ids
            # Sent once: they stay where the pictures are.
            ids = ids.to(pictures.device)
            return self.model(normalise(pictures), ids)

        return BoundModel(self.name, self.model.size, self.model, score)

    def modules(self) -> list[nn.Module]:
        return [self.model]


class ImageRewardModel(nn.Module):
    """tensors: of the file, for their shapes. heads: of the image and of the text encoder."""

    def __init__(self, tensors: Mapping[str, Tensor], heads: tuple[int, int] | None = None):
        super().__init__()
        vision, text = tensors["blip.visual_encoder.cls_token"], tensors["blip.text_encoder.embeddings.LayerNorm.bias"]
        image_heads, text_heads = heads or (heads_of(vision.shape[-1]), heads_of(len(text)))
        self.blip = nn.ModuleDict(
            {
                "visual_encoder": ImageEncoder(tensors, "blip.visual_encoder.", image_heads),
                "text_encoder": TextEncoder(tensors, "blip.text_encoder.", text_heads),
            }
        )
        self.mlp = LinearChain(tensors, "mlp.")
        self.checkpointing = False

    @property
    def size(self) -> int:
        return self.blip["visual_encoder"].size

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """pixels: normalised pictures `[B, 3, size, size]`; ids: `[1, N]` without padding. Returns scores `[B]`."""
        seen = self.blip["visual_encoder"](pixels, self.checkpointing)
        told = self.blip["text_encoder"](ids.expand(len(seen), -1), seen, self.checkpointing)
        return (self.mlp(told[:, 0].float()).squeeze(1) - _MEAN) / _STD
