"""What a training changes, in pictures: the same noises without masks and with those of now."""

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..maskunet_core.training.drawn import drawn
from ..maskunet_core.training.lent import LentModel
from .legend import captioned
from .pictures import enlarged, to_pillow

LEAST = 128
"""Side in pixels that small pictures are enlarged to."""
STEPS = 20
_GAP, _PAPER = 6, 24 / 255
NONE = "No pictures were asked for: set pictures to 1 or more."


class TrainingPictures:
    """captions: of the pictures trained on; `count` of the different ones are drawn, again with other noises where they
    are fewer. size: (width, height). cfg: 1 is without guidance.
    """

    def __init__(self, base: LentModel, captions: Sequence[str], count: int, size: tuple[int, int], cfg: float):
        self.base, self.size, self.cfg = base, size, cfg
        different = list(dict.fromkeys(captions))
        self._wanted = [(different[n % len(different)], n) for n in range(count)]
        self._before: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._wanted)

    def begin(self) -> None:
        """Draws them of the model as it is."""
        self._before = self._drawn(self.base.patcher)

    # As the host's nodes run: what it registers while it loads a model must be of the mode of the next graph.
    @torch.inference_mode()
    def _drawn(self, model: Any) -> list[Tensor]:
        found = []
        for picture in drawn(self.base, model, self._wanted, size=self.size, steps=STEPS, cfg=self.cfg):
            comfy.model_management.throw_exception_if_processing_interrupted()
            found.append(picture)
        # The host may have made room for the decoder.
        self.base.load()
        return found

    def beside(self, model: Any, when: str) -> Tensor:
        """`[N, H, W, 3]`: each picture before, and by a MODEL with masks. when: in words."""
        if not self._wanted:
            return captioned(torch.full((1, LEAST, 2 * LEAST, 3), _PAPER), [[NONE]])
        pairs = []
        for pair in zip(self._before, self._drawn(model)):
            left, right = (enlarged(picture, LEAST) for picture in pair)
            pairs.append(torch.cat([left, torch.full((len(left), _GAP, 3), _PAPER), right], 1))
        return captioned(torch.stack(pairs), [[f"before - {when}", prompt] for prompt, _ in self._wanted])


def as_preview(pictures: Tensor, largest: int = 512) -> tuple[str, Any, int]:
    """The first of some pictures as the host's progress bars take it."""
    return "JPEG", to_pillow(pictures[0]), largest
