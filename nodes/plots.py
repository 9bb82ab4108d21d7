"""Diagrams as IMAGEs, by matplotlib where it is installed; nothing else of the extension needs it."""

import io

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MISSING = "This diagram needs matplotlib.\nInstall it where ComfyUI runs:\npip install matplotlib"


def figure(width: float, height: float):
    """A matplotlib figure of its own, in inches, outside of any window system; None where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    found = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(found)
    return found


PAPER, INK, LINES = "#18181b", "#e4e4e7", "#3f3f46"
"""Of diagrams that stand beside pictures on the canvas."""


def darken(drawn) -> None:
    """Light text and lines on a dark ground, for all that the figure holds."""
    drawn.set_facecolor(PAPER)
    for axes in drawn.axes:
        axes.set_facecolor(PAPER)
        axes.tick_params(colors=INK)
        for part in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts):
            part.set_color(INK)
        for spine in axes.spines.values():
            spine.set_color(LINES)
    for legend in drawn.legends:
        for text in legend.get_texts():
            text.set_color(INK)


def to_image(drawn) -> Tensor:
    """[1, H, W, 3] in [0, 1] of a figure, or a picture of one sentence where there is none."""
    if drawn is None:
        picture = Image.new("RGB", (640, 160), "white")
        ImageDraw.Draw(picture).multiline_text((20, 30), MISSING, "black", ImageFont.load_default(24))
    else:
        content = io.BytesIO()
        drawn.savefig(content, format="png")
        picture = Image.open(content).convert("RGB")
    return torch.from_numpy(numpy.asarray(picture).astype(numpy.float32) / 255)[None]
