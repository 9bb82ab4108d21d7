"""Text2Video-Zero's way through the steps of a sampler: the first frame alone, and then all frames together."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import MaskUNetError
from .motion import Motion, foregrounds, later_frames, smoothed_background

Draw = Callable[[Tensor | None, int, int], Tensor]
"""`draw(x, start, end)`: latents `[N, C, h, w]` as the sampler holds them, after its steps from start to end. N are the
frames that look at the first of them. None stands for what the sampler begins the first frame with."""


@dataclass(frozen=True)
class VideoSettings:
    """frames: of the video. chunk: how many are drawn together, the first among them. motion: from one frame to the
    next. seed: of the noise of frames. t1, t0: noise levels; frames are moved at t0, and get noise up to t1 again.
    """

    frames: int = 8
    chunk: int = 8
    motion: Motion = field(default_factory=Motion)
    seed: int = 0
    t1: float = 10.4250
    t0: float = 7.5624

    def steps(self, sigmas: Tensor) -> tuple[int, int]:
        """After how many steps of a sampler its level is nearest to t1, and to t0: at least one, and never all."""
        if len(sigmas) < 3:
            raise MaskUNetError("The frames of a video part after the first step, so at least 2 steps are needed.")
        first, second = (int((sigmas[1:-1] - level).abs().argmin()) + 1 for level in (self.t1, self.t0))
        return first, max(first, second)

    def chunks(self) -> list[list[int]]:
        """Numbers of the frames that are drawn together; each list begins with the first frame."""
        size = max(1, self.chunk - 1)
        later = list(range(1, self.frames))
        return [[0, *later[start : start + size]] for start in range(0, max(1, len(later)), size)]

    def images(self, sigmas: Tensor) -> int:
        """Steps times images that a run computes."""
        first, second = self.steps(sigmas)
        together = sum(len(chunk) for chunk in self.chunks())
        return second + together * (len(sigmas) - 1 - first)


def draw_video(draw: Draw, sigmas: Tensor, settings: VideoSettings, foreground: Tensor | None = None) -> Tensor:
    """Finished latents `[frames, C, h, w]`.

    sigmas: noise levels of the sampler behind `draw`. foreground: `[frames, H, W]` or `[1, H, W]` in [0, 1]; outside of
    it frames take most of their start from the first, moved.
    """
    first, second = settings.steps(sigmas)
    at_t1 = draw(None, 0, first)
    at_t0 = draw(at_t1, first, second) if second > first else at_t1
    noise = float(sigmas[first] ** 2 - sigmas[second] ** 2) ** 0.5
    starts = torch.cat([at_t1, later_frames(at_t0, settings.frames, settings.motion, noise, settings.seed)])
    if foreground is not None:
        masks = foregrounds(foreground, settings.frames, settings.motion, *starts.shape[-2:])
        starts = smoothed_background(starts, masks.to(starts.device), settings.motion)
    frames = []
    for chunk in settings.chunks():
        drawn = draw(starts[chunk], first, len(sigmas) - 1)
        frames.append(drawn[1:] if frames else drawn)
    return torch.cat(frames)
