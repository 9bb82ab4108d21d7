"""A mask generator on its way from loader to sampler, and how the host moves it."""

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP

from ..maskunet_core.files.checkpoint import GeneratorFile
from ..maskunet_core.masks.copies import GeneratorCopies
from .patchers import whole_patcher


class LoadedGenerator:
    """What travels on a MASKUNET link: a generator file, whose tensors stay on the CPU, and its copies in use."""

    def __init__(self, file: GeneratorFile):
        self.file = file
        self._in_use: dict[torch.dtype, tuple[GeneratorCopies, ModelPatcher]] = {}

    def in_dtype(self, dtype: torch.dtype) -> tuple[GeneratorCopies, ModelPatcher]:
        """The generator for a mask source, and the patcher by which the host loads it beside a model."""
        if dtype not in self._in_use:
            copies = GeneratorCopies(self.file.generator, dtype)
            self._in_use[dtype] = copies, _new_patcher(copies)
        return self._in_use[dtype]


def _new_patcher(copies: GeneratorCopies, disable_dynamic: bool = False) -> ModelPatcher:
    """A patcher of a copy of its own. The host makes more of them where a model is spread over several devices."""
    patcher = whole_patcher(copies.new(), dynamic=not disable_dynamic)
    patcher.cached_patcher_init = (_new_patcher, (copies,))
    patcher.add_callback(CallbacksMP.ON_DETACH, lambda detached, _: copies.share(detached.model))
    return patcher
