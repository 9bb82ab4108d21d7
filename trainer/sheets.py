"""Sheets of pictures for people: without and with a method side by side, under their prompts."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Row = tuple[str, list[Image.Image], list[Image.Image]]
GAP, LETTERS = 6, 15
SHOWN = 256
"""Smaller pictures are enlarged to this width in pixels, by a whole factor."""


def to_image(picture: Tensor) -> Image.Image:
    """Of a picture `[H, W, 3]` in [0, 1]."""
    return Image.fromarray((picture * 255).round().byte().numpy())


def side_by_side(
    prompts: Sequence[str], left: Tensor, right: Tensor, names: tuple[str, str] = ("without masks", "with masks")
) -> Image.Image:
    """A row per prompt of two sets of pictures `[N, H, W, 3]`."""
    return contact_sheet([(p, [to_image(a)], [to_image(b)]) for p, a, b in zip(prompts, left, right)], names)


def contact_sheet(rows: Sequence[Row], names: tuple[str, str], shown: int = SHOWN) -> Image.Image:
    """A row per prompt: pictures without on the left, with on the right, all of one size. names: of the two halves."""
    font = ImageFont.load_default(LETTERS)
    columns, (width, height) = len(rows[0][1]), rows[0][1][0].size
    scale = max(1, shown // width)
    width, height = scale * width, scale * height
    half = columns * (width + GAP)
    # Letters are about half as wide as high.
    texts = [textwrap.fill(prompt, max(8, 2 * half // (LETTERS // 2 + 1))) for prompt, _, _ in rows]
    labels = [GAP + (LETTERS + 5) * (text.count("\n") + 1) for text in texts]
    head = LETTERS + 3 * GAP
    sheet = Image.new("RGB", (2 * half + 3 * GAP, head + sum(labels) + len(rows) * (height + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    middle = half + 2 * GAP
    for left, name in zip((GAP, middle), names):
        draw.text((left, GAP), name, fill="black", font=font)
    top = head
    for (_, before, after), text, label in zip(rows, texts, labels):
        draw.text((GAP, top), text, fill=(70, 70, 70), font=font)
        top += label
        for left, pictures in ((GAP, before), (middle, after)):
            for column, picture in enumerate(pictures):
                enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (left + column * (width + GAP), top))
        draw.line((middle - GAP, top, middle - GAP, top + height), fill=(200, 200, 200))
        top += height + GAP
    return sheet
