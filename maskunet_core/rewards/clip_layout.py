"""What files of CLIP do not tell: how many heads their towers have, and whether these use OpenAI's quick GELU.

Known for published shapes. For others a description decides, which repositories hold beside the weights: `config.json`
of transformers or `open_clip_config.json` of OpenCLIP.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .layers import BadTensors, heads_of

_VOCABULARY = 49408
"""Entries of CLIP's own vocabulary, the one that prompts are read by."""
_PUBLISHED = {
    (1280, 14, 224): (16, False),  # ViT-H/14 of LAION, HPSv2 and PickScore
    (1280, 14, 378): (16, True),  # ViT-H/14 of DFN
    (1408, 14, 224): (16, False),  # ViT-g/14 of LAION
    (1664, 14, 224): (16, False),  # ViT-bigG/14 of LAION
    (1024, 14, 336): (16, True),  # ViT-L/14 of OpenAI for larger pictures
}
"""Heads of the image tower and quick GELU by its width, the side of its patches and of its pictures."""
_OPENAI = {
    (1024, 14, 224): (16, True),  # ViT-L/14
    (768, 16, 224): (12, True),  # ViT-B/16
    (768, 32, 224): (12, True),  # ViT-B/32
}
"""The same of OpenAI's models, whose shapes LAION and others took over, some with GELU."""
_KEPT_IN_HALF = (1024, 14, 224)
"""Of this shape copies in half precision are taken for OpenAI's: these are in wide use."""

_OF_CLIP = {"vision_config", "hidden_size", "vision_cfg", "model_cfg"}
"""Keys by which the descriptions of transformers and OpenCLIP are known."""


@dataclass(frozen=True)
class ClipLayout:
    """quick: OpenAI's approximation of GELU. image_heads, text_heads: of attention, in the two towers."""

    quick: bool
    image_heads: int
    text_heads: int


def picture_side(tensors: Mapping[str, Tensor]) -> int:
    """Side in pixels of the square that an image tower looks at, from its tensors under OpenCLIP's names."""
    places = len(tensors["visual.positional_embedding"]) - 1
    return round(places**0.5) * tensors["visual.conv1.weight"].shape[-1]


def layout_of(tensors: Mapping[str, Tensor], description: Mapping[str, Any] | None = None) -> ClipLayout:
    """tensors: under OpenCLIP's names, of both towers or of the image tower alone. Raises BadTensors where it is open.

    description: what `read_description` gives, for files of other origin.
    """
    width, patch = len(tensors["visual.class_embedding"]), tensors["visual.conv1.weight"].shape[-1]
    words, text_width = tensors["token_embedding.weight"].shape if "token_embedding.weight" in tensors else (None, 0)
    if words not in (None, _VOCABULARY):
        raise BadTensors(
            f"reads prompts by a vocabulary of {words} words",
            f"only CLIP's own, of {_VOCABULARY}, is known here. Choose another file.",
        )
    if description is not None:
        return _described(description, width, text_width)
    shape = (width, patch, picture_side(tensors))
    known = _PUBLISHED.get(shape) or (_OPENAI.get(shape) if _may_be_openai(shape, tensors) else None)
    if known is None:
        raise BadTensors(
            f"is a CLIP with an image tower {width} wide for pictures of {shape[2]}x{shape[2]}, and does not tell "
            "whether it works with GELU or quick GELU and with how many heads",
            "put config.json or open_clip_config.json of its repository beside it, under its own name with the ending "
            ".json.",
        )
    heads, quick = known
    return ClipLayout(quick, heads, heads_of(text_width))


def _may_be_openai(shape: tuple[int, int, int], tensors: Mapping[str, Tensor]) -> bool:
    """OpenAI's weights were released in half precision: what has more digits than that is of other origin."""
    weight = tensors["visual.conv1.weight"]
    if weight.dtype != torch.float32:
        return shape == _KEPT_IN_HALF
    return bool(((weight.half().float() == weight) | weight.isnan()).all())


def read_description(weights: Path) -> dict[str, Any] | None:
    """What lies beside a file of weights under its name with the ending .json, if it is about a CLIP, else None: other
    programs put notes of their own there."""
    try:
        content = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and content.keys() & _OF_CLIP else None


def _unusable(reason: str) -> BadTensors:
    return BadTensors(
        f"has a description beside it that is of no use, because {reason}",
        "put config.json or open_clip_config.json of its repository there under that name, or remove it.",
    )


def _described(description: Mapping[str, Any], width: int, text_width: int) -> ClipLayout:
    """The layout that a description gives. Raises BadTensors where it does not fit the widths of the towers."""
    try:
        transformers = "vision_config" in description or "hidden_size" in description
        image, text, layout = (_of_transformers if transformers else _of_openclip)(description)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise _unusable(f"it does not describe a CLIP ({type(error).__name__}: {error})") from None
    if image != width or (text_width and text != text_width):
        raise _unusable(f"it is of towers {image} and {text} wide, where the file's are {width} and {text_width}")
    heads = layout.image_heads, layout.text_heads
    if min(heads) < 1 or width % heads[0] or text_width % heads[1]:
        raise _unusable(f"{heads[0]} and {heads[1]} heads do not fit towers {image} and {text} wide")
    return layout


def _of_transformers(description: Mapping[str, Any]) -> tuple[int, int, ClipLayout]:
    """Widths of the image and the text tower, and the layout. What a config leaves out has transformers' defaults."""
    # That of an image tower alone has no parts.
    image, text = description.get("vision_config", description), description.get("text_config")
    acts = {part.get("hidden_act", "quick_gelu") for part in (image, text) if part is not None}
    text = text or {}
    if not acts <= {"gelu", "quick_gelu"} or len(acts) > 1:
        raise ValueError(f"its activation is {' and '.join(sorted(map(str, acts)))}, not gelu or quick_gelu")
    heads = int(image.get("num_attention_heads", 12)), int(text.get("num_attention_heads", 8))
    widths = int(image.get("hidden_size", 768)), int(text.get("hidden_size", 512))
    return *widths, ClipLayout(acts == {"quick_gelu"}, *heads)


def _of_openclip(description: Mapping[str, Any]) -> tuple[int, int, ClipLayout]:
    """The same of OpenCLIP's description, with OpenCLIP's defaults."""
    model = description.get("model_cfg", description)
    image, text = model["vision_cfg"], model["text_cfg"]
    width, head_width = int(image.get("width", 768)), int(image.get("head_width", 64))
    layout = ClipLayout(bool(model.get("quick_gelu", False)), width // head_width, int(text.get("heads", 8)))
    return width, int(text.get("width", 512)), layout
