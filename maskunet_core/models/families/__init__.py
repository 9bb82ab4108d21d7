"""Kinds of diffusion models that can be masked, one file each: what they are known by, and what is masked in them.

To add a kind, write a file like `krea2.py` and list it here, and a tiny model of it in the tests.
"""

from torch import nn

from .cosmos import COSMOS
from .family import Family
from .flux import FLUX
from .krea2 import KREA2
from .ltx import LTX
from .nextdit import NEXTDIT
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .unet import UNET
from .wan import WAN

FAMILIES: tuple[Family, ...] = (UNET, NEXTDIT, FLUX, KREA2, QWEN_IMAGE, COSMOS, SD3, WAN, LTX)


def family_of(diffusion_model: nn.Module) -> Family | None:
    """Found by structure and never by class; None where no kind is like it."""
    return next((family for family in FAMILIES if family.knows(diffusion_model)), None)
