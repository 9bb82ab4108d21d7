"""Text under pictures."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_BACKGROUND, _INK = (24, 24, 27), (244, 244, 245)


def captioned(images: Tensor, lines: list[list[str]]) -> Tensor:
    """Pictures `[B, H, W, 3]` in [0, 1] with lines of text under each: `[B, H + strip, W', 3]`.

    The text is as large as is readable at the picture's size, 14 pixels at least. A line that is wider than the picture
    is broken at its double spaces, and where that does not suffice the picture gets margins. All pictures of a batch
    stay one size.
    """
    count, height, width = images.shape[:3]
    font = ImageFont.load_default(max(14, width // 28))
    if any(font.getlength(line) > width for text in lines for line in text):
        lines = [[part for line in text for part in line.split("  ")] for text in lines]
    ascent, descent = font.getmetrics()
    step, margin = round(1.25 * (ascent + descent)), ascent // 2
    text_width = max((int(np.ceil(font.getlength(line))) for text in lines for line in text), default=0)
    full_width = max(width, text_width + 2 * margin)
    strip = max(map(len, lines), default=0) * step + 2 * margin
    left = (full_width - width) // 2
    result = torch.empty(count, height + strip, full_width, 3)
    for n, text in enumerate(lines):
        canvas = Image.new("RGB", (full_width, height + strip), _BACKGROUND)
        draw = ImageDraw.Draw(canvas)
        for row, line in enumerate(text):
            draw.text((full_width / 2, height + margin + row * step), line, _INK, font, anchor="ma")
        result[n] = torch.from_numpy(np.asarray(canvas, np.float32) / 255)
        result[n, :height, left : left + width] = images[n]
    return result
