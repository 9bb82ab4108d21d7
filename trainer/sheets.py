"""Sheets of pictures for people: without and with a method side by side, under their prompts."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP, LETTERS = 6, 15
SHOWN = 256
"""Smaller pictures are enlarged to this width in pixels, by a whole factor."""


def to_image(picture: Tensor) -> Image.Image:
    """Of a picture `[H, W, 3]` in [0, 1]."""
    return Image.fromarray((picture * 255).round().byte().numpy())


def side_by_side(
    prompts: Sequence[str], left: Tensor, right: Tensor, names: tuple[str, str] = ("without masks", "with masks")
) -> Image.Image:
    """A row per prompt of two sets of pictures `[N, H, W, 3]`, of one size. names: of the two sets."""
    font = ImageFont.load_default(LETTERS)
    height, width = left.shape[1:3]
    scale = max(1, SHOWN // width)
    width, height = scale * width, scale * height
    # Letters are about half as wide as high.
    texts = [textwrap.fill(prompt, max(8, 2 * (width + GAP) // (LETTERS // 2 + 1))) for prompt in prompts]
    labels = [GAP + (LETTERS + 5) * (text.count("\n") + 1) for text in texts]
    head = LETTERS + 3 * GAP
    sheet = Image.new("RGB", (2 * width + 5 * GAP, head + sum(labels) + len(texts) * (height + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    middle = width + 3 * GAP
    for column, name in zip((GAP, middle), names):
        draw.text((column, GAP), name, fill="black", font=font)
    top = head
    for text, label, *pair in zip(texts, labels, left, right):
        draw.text((GAP, top), text, fill=(70, 70, 70), font=font)
        top += label
        for column, picture in zip((GAP, middle), pair):
            sheet.paste(to_image(picture).resize((width, height), Image.Resampling.NEAREST), (column, top))
        draw.line((middle - GAP, top, middle - GAP, top + height), fill=(200, 200, 200))
        top += height + GAP
    return sheet
