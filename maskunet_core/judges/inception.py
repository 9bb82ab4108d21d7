"""Inception v3 as the Frechet distance uses it (arXiv 1706.08500), and the ways to bring a picture to it.

Parameters have the names of pytorch-fid's file. It is torchvision's network with two changes that matter for features:
means at borders count the map's own cells alone, and the last block takes a maximum in place of a mean.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..rewards.layers import fill
from .pictures import central_square, levels, square

SIDE = 299
_STEM = ("Conv2d_1a_3x3/2 Conv2d_2a_3x3/1 Conv2d_2b_3x3 max/2 Conv2d_3b_1x1 Conv2d_4a_3x3/1 max/2",)
_A = ("branch1x1", "branch5x5_1 branch5x5_2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", "mean branch_pool")
_B = ("branch3x3/2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3/2", "max/2")
_C = (
    "branch1x1",
    "branch7x7_1 branch7x7_2 branch7x7_3",
    "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5",
    "mean branch_pool",
)
_D = ("branch3x3_1 branch3x3_2/2", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4/2", "max/2")
_E = (
    "branch1x1",
    "branch3x3_1 branch3x3_2a|branch3x3_2b",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a|branch3x3dbl_3b",
)
_BLOCKS = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), _A),
    "Mixed_6a": _B,
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), _C),
    "Mixed_7a": _D,
    "Mixed_7b": (*_E, "mean branch_pool"),
    "Mixed_7c": (*_E, "max branch_pool"),
}
"""Branches of each block, whose results are put together: layers one after the other, or `a|b` side by side. `/2` and
`/1` are strides of layers without a border around the map; others have one, and keep its size."""


class Inception(nn.Module):
    """tensors: of the file, for their shapes."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        self.stem = _Block(tensors, "", _STEM)
        self.blocks = nn.ModuleDict({name: _Block(tensors, f"{name}.", of) for name, of in _BLOCKS.items()})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Inception":
        """Raises BadTensors."""
        with torch.device("meta"):
            model = cls(tensors)
        fill(model.stem, tensors, torch.float32)
        for name, block in model.blocks.items():
            fill(block, tensors, torch.float32, f"{name}.")
        return model.eval()

    def forward(self, pictures: Tensor) -> Tensor:
        """Features `[B, 2048]` of pictures `[B, 3, 299, 299]` from -1 to 1."""
        x = self.stem(pictures)
        for block in self.blocks.values():
            x = block(x)
        return x.mean((2, 3))


class _Block(nn.Module):
    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, branches: tuple[str, ...]):
        super().__init__()
        self.branches = branches
        for text in " ".join(branches).replace("|", " ").split():
            name, _, stride = text.partition("/")
            if name not in ("max", "mean"):
                shape = tensors[f"{prefix}{name}.conv.weight"].shape
                self.add_module(name, _Convolution(shape, stride))

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for branch in self.branches:
            y = x
            for step in branch.split():
                y = torch.cat([self._layer(text, y) for text in step.split("|")], 1)
            found.append(y)
        return torch.cat(found, 1)

    def _layer(self, text: str, x: Tensor) -> Tensor:
        name, _, stride = text.partition("/")
        if name == "max":
            return F.max_pool2d(x, 3, int(stride or 1), padding=0 if stride else 1)
        if name == "mean":
            return F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)
        return getattr(self, name)(x)


class _Convolution(nn.Module):
    def __init__(self, shape: torch.Size, stride: str):
        super().__init__()
        outputs, inputs, *kernel = shape
        padding = 0 if stride else tuple(side // 2 for side in kernel)
        self.conv = nn.Conv2d(inputs, outputs, tuple(kernel), int(stride or 1), padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


# From a picture to the network, as each protocol does ---------------------------------------------------------------

Prepare = Callable[[Image.Image], Tensor]
"""A picture to `[3, 299, 299]`, from -1 to 1."""


@dataclass(frozen=True)
class Protocol:
    """drawn, real: how pictures of the two sets are brought to the network. used_by: for people."""

    drawn: Prepare
    real: Prepare
    used_by: str


def _clean(picture: Image.Image) -> Tensor:
    """Bicubic in floating point, each channel on its own, without rounding."""
    channels = [Image.fromarray(channel.numpy()) for channel in levels(picture).float()]
    resized = [np.asarray(channel.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for channel in channels]
    return (torch.from_numpy(np.stack(resized)).clamp(0, 255) - 128) / 128


def _bilinear(picture: Image.Image) -> Tensor:
    """Bilinear between the four nearest pixels, however many lie between."""
    pixels = levels(picture)[None].float() / 255
    return 2 * F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", align_corners=False)[0] - 1


def _as_tensorflow_1(picture: Image.Image) -> Tensor:
    """Bilinear from the pixels' corners, not their centres."""
    pixels = levels(picture).float()
    for axis in (1, 2):
        size = pixels.shape[axis]
        places = torch.arange(SIDE, dtype=torch.float32) * (size / SIDE)
        first = places.floor().long()
        share = (places - first).unsqueeze(-1) if axis == 1 else places - first
        low, high = (pixels.index_select(axis, at) for at in (first, (first + 1).clamp(max=size - 1)))
        pixels = low + (high - low) * share
    return (pixels - 128) / 128


def _central_square(picture: Image.Image) -> Tensor:
    """The central square, bicubic, rounded to grey levels."""
    return 2 * (levels(central_square(picture, SIDE)).float() / 255) - 1


def _small(picture: Image.Image) -> Image.Image:
    return picture.convert("RGB").resize((256, 256), Image.Resampling.BICUBIC)


def _small_jpeg(picture: Image.Image) -> Tensor:
    file = io.BytesIO()
    _small(picture).save(file, format="JPEG")
    return _bilinear(Image.open(file))


PROTOCOLS = {
    "clean": Protocol(_clean, _clean, "clean-fid"),
    "clean-crop": Protocol(_clean, lambda picture: _clean(square(picture, 512)), "MosaicML's diffusion"),
    "pytorch-fid": Protocol(_bilinear, _bilinear, "pytorch-fid on pictures as they are"),
    "torch-fidelity": Protocol(_as_tensorflow_1, _as_tensorflow_1, "torch-fidelity, torchmetrics"),
    "t2ibenchmark": Protocol(_central_square, _central_square, "text2image-benchmark"),
    "bk-sdm": Protocol(_small_jpeg, _small_jpeg, "BK-SDM"),
}
"""Ways to reckon the same distance, which differ by more than methods do: only numbers of one protocol are compared."""
