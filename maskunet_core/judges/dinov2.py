"""DINOv2 (arXiv 2304.07193), whose features tell a Frechet distance that people's judgement agrees with better than
Inception's (arXiv 2306.04675).

Parameters have the names of the published file, `dinov2_vitl14_pretrain.pth`; transformers' are renamed.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..rewards.blip_layers import ImageEncoder
from ..rewards.layers import fill, heads_of
from .names import joined, renamed
from .pictures import levels

SIDE = 224
"""In pixels, to which pictures are squashed."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_OFFSET = 0.1
"""Patches more, when places are resized: the published network was made so, against errors of rounding."""
_OF_TRANSFORMERS = {
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.": "",
    r"^encoder\.layer\.": "blocks.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.attention\.attention\.": ".attn.",
    r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma",
    r"^layernorm\.": "norm.",
}
_JOINED = (("attn.query.", "attn.key.", "attn.value.", "attn.qkv."),)
"""Queries, keys and values that transformers keeps apart."""


class Dinov2(ImageEncoder):
    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], heads: int | None = None) -> "Dinov2":
        """heads: where they are not 64 wide. Raises BadTensors."""
        with torch.device("meta"):
            model = cls(tensors, "", heads or heads_of(tensors["cls_token"].shape[-1]))
        return fill(model, tensors, torch.float32)

    def positions(self, rows: int, columns: int) -> Tensor:
        own = math.isqrt(self.pos_embed.shape[1] - 1)
        if (rows, columns) == (own, own):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (own, own)).movedim(-1, 1)
        factors = tuple((side + _OFFSET) / own for side in (rows, columns))
        resized = F.interpolate(grid, scale_factor=factors, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], 1)

    @torch.no_grad()
    def features(self, pictures: list[Image.Image]) -> Tensor:
        """`[N, width]`, on the CPU: the class token."""
        pixels = torch.stack([prepare(picture) for picture in pictures]).to(self.cls_token.device)
        return self(pixels)[:, 0].cpu()


def prepare(picture: Image.Image) -> Tensor:
    """`[3, 224, 224]`: squashed, bicubic, as Pillow does."""
    small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return (levels(small).float() / 255 - mean) / std


def to_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of transformers' DINOv2; those of the published file pass through. Raises BadTensors."""
    return joined(renamed(tensors, _OF_TRANSFORMERS), _JOINED)
