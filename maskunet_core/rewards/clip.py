"""Rewards of CLIP's architecture: HPSv2 and HPSv2.1 (arXiv 2306.09341), PickScore (arXiv 2305.01569), CLIP itself.

Parameters have OpenCLIP's names, as in HPSv2's files; `to_openclip` renames those of transformers, as in PickScore's.
"""

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clip_layout import ClipLayout, layout_of, picture_side
from .layers import BadTensors, attend, depth_of, fill, run
from .preprocess import normalise
from .reward import BoundModel, BoundReward, Reward
from .tokens import clip_tokens

_MOST_FEATURES = 256
"""Embeddings of prompts that a reward keeps."""


class ClipReward(Reward):
    """`scale` times the cosine between picture and prompt: 1 for HPSv2, exp(logit_scale) for PickScore and CLIP.

    The text tower stays on the CPU, in fp32: a prompt passes it once.
    """

    def __init__(self, name: str, image: "ImageTower", text: "TextTower", scale: float = 1.0):
        self.name, self.image, self.text, self.scale = name, image, text, scale
        self._features: dict[str, Tensor] = {}

    @classmethod
    def from_tensors(
        cls,
        name: str,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        *,
        scaled: bool,
        checkpointing: bool = False,
        layout: ClipLayout | None = None,
    ) -> "ClipReward":
        """tensors: under OpenCLIP's names. scaled: whether the score is exp(logit_scale) times the cosine.
        layout: where it does not follow from the shapes. Raises BadTensors."""
        layout = layout or layout_of(tensors)
        image = ImageTower.from_tensors(tensors, dtype, layout, checkpointing=checkpointing)
        with torch.device("meta"):
            text = TextTower(tensors, layout)
        scale = _exponential(float(tensors["logit_scale"])) if scaled else 1.0
        return cls(name, image, fill(text, tensors, torch.float32), scale)

    def feature(self, prompt: str) -> Tensor:
        """The prompt's embedding `[E]` of length 1. The newest are kept; a cache of functools would hold `self`, too,
        in a cycle that frees no memory until the collector runs."""
        if prompt not in self._features:
            with torch.inference_mode(False), torch.no_grad():
                feature = F.normalize(self.text(clip_tokens(prompt)[None]), dim=-1)[0]
            while len(self._features) >= _MOST_FEATURES:
                del self._features[next(iter(self._features))]
            self._features[prompt] = feature
        return self._features[prompt]

    def bind(self, prompt: str) -> BoundReward:
        feature = self.feature(prompt)

        def score(pictures: Tensor) -> Tensor:
            nonlocal feature
            embeddings = F.normalize(self.image(normalise(pictures)).float(), dim=-1)
            # Sent once: it stays where the pictures are.
            feature = feature.to(embeddings)
            return self.scale * (embeddings @ feature)

        return BoundModel(self.name, self.image.size, self.image, score)

    def modules(self) -> list[nn.Module]:
        return [self.image]


class ImageTower(nn.Module):
    """Normalised pictures `[B, 3, size, size]` to embeddings `[B, E]`.

    tensors: of the file, for their shapes, with the prefix `visual.`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], layout: ClipLayout):
        super().__init__()
        positions, width = tensors["visual.positional_embedding"].shape
        patch = tensors["visual.conv1.weight"].shape[-1]
        self.size = picture_side(tensors)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(positions, width))
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = _Transformer(
            tensors, "visual.transformer.", width, layout.image_heads, layout.quick, causal=False
        )
        self.proj = nn.Parameter(torch.empty(tensors["visual.proj"].shape))
        self.checkpointing = False

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        layout: ClipLayout,
        *,
        checkpointing: bool = False,
    ) -> "ImageTower":
        with torch.device("meta"):
            tower = cls(tensors, layout)
        tower.checkpointing = checkpointing
        return fill(tower, tensors, dtype, "visual.")

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], 1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x), self.checkpointing)
        return self.ln_post(x[:, 0]) @ self.proj


class TextTower(nn.Module):
    """Token ids `[B, 77]` to embeddings `[B, E]`, read at the end token, which has the highest id."""

    def __init__(self, tensors: Mapping[str, Tensor], layout: ClipLayout):
        super().__init__()
        words, width = tensors["token_embedding.weight"].shape
        self.token_embedding = nn.Embedding(words, width)
        self.positional_embedding = nn.Parameter(torch.empty(tensors["positional_embedding"].shape))
        self.transformer = _Transformer(tensors, "transformer.", width, layout.text_heads, layout.quick, causal=True)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(tensors["text_projection"].shape))

    def forward(self, ids: Tensor) -> Tensor:
        end = ids.argmax(-1)
        # Attention is causal: what comes after the last end token changes nothing.
        ids = ids[:, : int(end.max()) + 1]
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        x = self.ln_final(self.transformer(x, checkpointing=False))
        return x[torch.arange(len(x)), end] @ self.text_projection


class _Transformer(nn.Module):
    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, width: int, heads: int, quick: bool, causal: bool):
        super().__init__()
        hidden, depth = len(tensors[prefix + "resblocks.0.mlp.c_fc.bias"]), depth_of(tensors, prefix + "resblocks.")
        self.resblocks = nn.ModuleList(_Block(width, hidden, heads, quick, causal) for _ in range(depth))

    def forward(self, x: Tensor, checkpointing: bool) -> Tensor:
        return run(self.resblocks, x, checkpointing=checkpointing)


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, quick: bool, causal: bool):
        super().__init__()
        self.quick = quick
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _Attention(width, heads, causal)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, hidden), "c_proj": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        inner = self.mlp["c_fc"](self.ln_2(x))
        inner = inner * torch.sigmoid(1.702 * inner) if self.quick else F.gelu(inner)
        return x + self.mlp["c_proj"](inner)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        return self.out_proj(attend(query, key, value, self.heads, self.causal))


def _exponential(logit_scale: float) -> float:
    """By what a cosine is multiplied; CLIP never lets it grow beyond 100. Raises BadTensors."""
    if not abs(logit_scale) < 20:
        raise BadTensors(f"has a logit_scale of {logit_scale:g}, which no CLIP has")
    return math.exp(logit_scale)


_RENAMED = {
    r"vision_model\.embeddings\.class_embedding": "visual.class_embedding",
    r"vision_model\.embeddings\.patch_embedding\.": "visual.conv1.",
    r"vision_model\.embeddings\.position_embedding\.weight": "visual.positional_embedding",
    r"vision_model\.pre_layrnorm\.": "visual.ln_pre.",
    r"vision_model\.post_layernorm\.": "visual.ln_post.",
    r"vision_model\.encoder\.layers\.": "visual.transformer.resblocks.",
    r"text_model\.embeddings\.token_embedding\.": "token_embedding.",
    r"text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
    r"text_model\.final_layer_norm\.": "ln_final.",
    r"text_model\.encoder\.layers\.": "transformer.resblocks.",
    r"\.self_attn\.": ".attn.",
    r"\.layer_norm([12])\.": r".ln_\1.",
    r"\.mlp\.fc1\.": ".mlp.c_fc.",
    r"\.mlp\.fc2\.": ".mlp.c_proj.",
}


def to_openclip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of transformers' CLIPModel (or of its image half) under OpenCLIP's names; other tensors pass through."""
    renamed = {}
    for name, value in tensors.items():
        if name.startswith(("vision_model.", "text_model.")):
            for old, new in _RENAMED.items():
                name = re.sub(old, new, name)
        renamed[name] = value
    for old, new in (("visual_projection.weight", "visual.proj"), ("text_projection.weight", "text_projection")):
        if old in renamed and renamed[old].ndim == 2:
            renamed[new] = renamed.pop(old).T
    for name in [name for name in renamed if ".attn.q_proj." in name]:
        parts = [renamed.pop(name.replace(".q_proj.", f".{part}_proj."), None) for part in "qkv"]
        if all(part is not None and part.ndim and part.shape == parts[0].shape for part in parts):
            renamed[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return renamed
