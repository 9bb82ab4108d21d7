"""`method = "embedding"`, alone or together with a method that changes the U-Net, as in "embedding+maskunet"."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from maskunet_core.files import checkpoint
from maskunet_core.masks.sources import GeneratorMasks
from maskunet_core.seam.attach import attach, structure_of
from maskunet_core.seam.layers import masked, modules_of
from maskunet_core.training.base import BaseModel, checkpointed, load_for_training

from ..config import Config
from ..host import GENERATORS, model_file
from .word import MARK, LearnedWord


class EmbeddingMethod:
    """A learned word, and a method that changes the U-Net beside it, or None.

    The base that it is compared with has the start's vectors in the word's place, and the generator of
    `embedding.generator`.
    """

    def __init__(self, base: BaseModel, config: Config, beside: Any):
        self.base, self.config, self.beside = base, config, beside
        base.encodes_in_steps = True
        settings = config.embedding
        self.word = LearnedWord(base, config.result.stem, settings.start, settings.vectors)
        self.module = nn.ModuleDict({"word": self.word})
        if beside:
            self.module["beside"] = beside.module
        self.generator = _generator(base, settings.generator)

    @property
    def statistics(self) -> Any:
        return self.beside and self.beside.statistics

    def observe(self, on: bool) -> None:
        if self.beside:
            self.beside.observe(on)

    def groups(self) -> list[dict[str, Any]]:
        own = [{"params": list(self.word.parameters()), "lr": self.config.embedding.lr}]
        return own + (self.beside.groups() if self.beside else [])

    # On the U-Net -----------------------------------------------------------------------------------------------

    def _under_generator(self) -> contextlib.AbstractContextManager[None]:
        if self.generator is None:
            return contextlib.nullcontext()
        return masked(modules_of(self.base.unet), [(self.generator, 1.0)])

    @property
    def _model(self) -> Any:
        if self.generator is None:
            return self.base.patcher
        return attach(self.base.patcher, self.generator, 1.0, 0.0, 1.0)

    @contextlib.contextmanager
    def acting(self, training: bool = True) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.config.loop.checkpointing:
                unet = self.base.unet
                stack.enter_context(checkpointed(unet.input_blocks, unet.middle_block, unet.output_blocks))
            stack.enter_context(self._under_generator())
            if self.beside:
                stack.enter_context(self.beside.acting(training))
            yield

    @contextlib.contextmanager
    def sampling(self) -> Iterator[Any]:
        with self.word.known():
            if self.beside is None:
                yield self._model
                return
            with self.beside.sampling() as model:
                yield model

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        with self.word.held_at(self.word.start), self._under_generator():
            yield

    @contextlib.contextmanager
    def idle_sampling(self) -> Iterator[Any]:
        with self.word.held_at(self.word.start), self.word.known():
            yield self._model

    # Texts and files --------------------------------------------------------------------------------------------

    def prompt(self, text: str) -> str:
        return self.word.prompt(text)

    def example(self, count: int) -> dict[str, Tensor]:
        load_for_training(self.base)
        ids = {key: found.expand(count, -1) for key, found in self.word.ids(MARK).items()}
        return self.word.encode(ids)

    def files(self, result: Path) -> dict[Path, tuple[str, str]]:
        found = {result: ("embeddings", f'write "embedding:{result.stem}" into a prompt, between spaces')}
        if self.beside:
            found |= self.beside.files(result.with_name(self.config.results[1].name))
        return found

    def save(self, path: Path, record: dict[str, Any]) -> None:
        self.word.save(path, record)
        if self.beside:
            self.beside.save(path.with_name(self.config.results[1].name), record)


def _generator(base: BaseModel, file: str) -> GeneratorMasks | None:
    """The masks of a trained generator. Raises MaskUNetError for a file that is none, or does not fit."""
    if not file:
        return None
    loaded = checkpoint.load(model_file(GENERATORS, file) or Path(file))
    loaded.require_fit(structure_of(base.patcher, loaded.targets))
    return GeneratorMasks(loaded.generator.to(base.patcher.load_device))
