"""One training inside the host."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from PIL import Image

from ..maskunet_core.errors import MaskUNetError
from ..maskunet_core.files import checkpoint
from ..maskunet_core.masks.sources import GeneratorMasks
from ..maskunet_core.models.structure import Structure
from ..maskunet_core.replacing import replacing
from ..maskunet_core.seam.attach import attach, structure_of
from ..maskunet_core.seam.attention import attention_notice
from ..maskunet_core.seam.layers import presented_weights
from ..maskunet_core.torch_file import read_torch
from ..maskunet_core.training.alone import Alone
from ..maskunet_core.training.base import fitting
from ..maskunet_core.training.buckets import bucket_sizes, nearest_bucket
from ..maskunet_core.training.cost import MB, estimate, total_memory
from ..maskunet_core.training.data import EncodedPictures, encode_pictures
from ..maskunet_core.training.lent import LentModel, frozen
from ..maskunet_core.training.run import Training
from ..maskunet_core.training.settings import Settings, plain_values
from ..maskunet_core.training.validate import told_gain
from .folders import TRAININGS
from .loaded_generator import LoadedGenerator
from .saving import NumberedFiles
from .training_curve import loss_curve
from .training_pictures import TrainingPictures, as_preview
from .training_progress import TrainingProgress, in_words

LESS_MEMORY = "lower resolution or batch"
PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
SAVED = "The same inputs go on from there."
PREVIEWS = 4
"""How often pictures are drawn in a training, the last time of what it made."""


class NodeTraining(Training):
    """A training that tells on its node how it goes, and keeps what the loss curve shows.

    losses: of each step. held_out_losses: (step, loss, difference to the base's) of each validation.
    """

    def __init__(self, *args: Any, progress: TrainingProgress, pictures: TrainingPictures):
        super().__init__(*args)
        self.progress, self.pictures = progress, pictures
        self.losses: list[float] = []
        self.held_out_losses: list[tuple[int, float, float]] = []

    def stepped(self, loss: float, observed: bool) -> None:
        self.losses.append(loss)
        self.progress.step(self.step, self.losses)

    def validated(self, found: dict[str, float]) -> None:
        self.held_out_losses.append((self.step, found["loss"], found["change"]))

    def between_steps(self) -> None:
        super().between_steps()
        steps = self.config.loop.steps
        apart = max(1, steps // PREVIEWS)
        if self.pictures and self.step % apart == 0 and self.step < steps:
            with self.method.sampling() as model:
                self.progress.show(as_preview(self.pictures.beside(model, f"step {self.step}")))

    def state(self) -> dict[str, Any]:
        return super().state() | {"losses": self.losses, "held_out_losses": self.held_out_losses}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.losses, self.held_out_losses = state["losses"], state["held_out_losses"]

    def curve(self) -> torch.Tensor:
        return loss_curve(self.losses, self.held_out_losses, self.best and self.best["step"])


class TrainRun:
    """Pictures to a generator file. Made and run outside of inference mode.

    pictures: RGB, with a caption each. settings_for: of a number of steps. minutes: what they shall take, in the
    place of `steps`; 0 for these. resolution: side of a square of the pictures' area. name: of the file, see `files`.
    shown: how many pictures are drawn before, now and then, and after, with `cfg`.
    """

    def __init__(
        self,
        base: LentModel,
        pictures: list[Image.Image],
        captions: list[str],
        *,
        settings_for: Callable[[int], Settings],
        steps: int,
        minutes: float,
        resolution: int,
        name: str,
        files: NumberedFiles,
        shown: int,
        cfg: float,
        node_id: str | None,
    ):
        self.base, self.name, self.files = base, name, files
        self.computing = base.model.get_dtype_inference()
        self.settings_for, self.minutes = settings_for, minutes
        self.settings = self._settings(steps)
        self.pictures, self.captions = pictures, captions
        # As the trainer has it: pictures of small models are cut finer.
        self.sizes = bucket_sizes(resolution, 64 if resolution >= 256 else 8)
        self.shown = TrainingPictures(base, captions, shown, self._size, cfg)
        self.progress = TrainingProgress(steps, node_id)

    def _settings(self, steps: int) -> Settings:
        settings = self.settings_for(steps)
        loop = dataclasses.replace(settings.loop, precision=PRECISIONS.get(self.computing, "fp32"))
        return dataclasses.replace(settings, loop=loop)

    @property
    def _size(self) -> tuple[int, int]:
        """(width, height) of the largest pictures as they are trained on."""
        return max((nearest_bucket(*p.size, self.sizes) for p in self.pictures), key=lambda size: size[0] * size[1])

    def run(self) -> tuple[LoadedGenerator, Path, torch.Tensor, torch.Tensor]:
        """(what was trained, its file, the loss curve, pictures before and after).

        An interrupt saves the state and goes through.
        """
        self.files.require_inside(self.name)
        structure = structure_of(self.base.patcher, self.settings.targets)
        loop = self.settings.loop
        self.base.reserve(structure, loop.batch // loop.accumulate, self._size)
        device = self.base.patcher.load_device
        drawing = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(drawing), frozen(self.base.unet):
            data = self._encoded()
            folder = self._folder(structure, data)
            training = self._begun(data, folder)
            self.shown.begin()
            what = f"A step of {loop.batch // loop.accumulate} pictures"
            with fitting(what, device, LESS_MEMORY), _writable(folder), self._saved_if_interrupted(training):
                training.train()
            path = self._saved(training)
            loaded = checkpoint.load(path)
            masked = attach(self.base.patcher, GeneratorMasks(loaded.generator), 1.0, 0.0, 1.0)
            pictures = self.shown.beside(masked, "after")
        shutil.rmtree(folder, ignore_errors=True)
        return LoadedGenerator(loaded), path, training.curve(), pictures

    @contextlib.contextmanager
    def _saved_if_interrupted(self, training: NodeTraining) -> Iterator[None]:
        """The host's layers raise where the user cancels: parameters are then those of the last whole step."""
        try:
            yield
        except comfy.model_management.InterruptProcessingException:
            training.save_state()
            self.progress.tell(f"Stopped: step {training.step} of {training.config.loop.steps} is saved. {SAVED}")
            raise

    @torch.inference_mode()
    def _encoded(self) -> EncodedPictures:
        done = 0

        def told() -> None:
            nonlocal done
            done += 1
            comfy.model_management.throw_exception_if_processing_interrupted()
            self.progress.tell(f"encoded picture {done} of {len(self.pictures)}")

        return encode_pictures(
            self.pictures,
            self.captions,
            sizes=self.sizes,
            encode_picture=self.base.encode_picture,
            encode_text=self.base.encode_text,
            flip=self.settings.data.flip,
            progress=told,
        )

    def _folder(self, structure: Structure, data: EncodedPictures) -> Path:
        """Of the state: the same for the same inputs, and for no others."""
        asked = [plain_values(self.settings), structure.to_dict()]
        digest = hashlib.sha256(json.dumps(asked + [self.minutes] * bool(self.minutes)).encode())
        for rows in data.buckets:
            conditions = data.conditions(rows, torch.zeros(len(rows), dtype=torch.bool))
            for tensor in (data.latents(rows), *conditions.values()):
                digest.update(tensor.numpy().tobytes())
        # A few of the model's weights, with its LoRAs, tell models of one kind apart.
        weight_of = presented_weights(self.base.patcher, structure.layers)
        for layer in structure.layers:
            digest.update(weight_of(layer)[0].cpu().numpy().tobytes())
        return Path(folder_paths.get_output_directory(), TRAININGS, digest.hexdigest()[:16])

    def _begun(self, data: EncodedPictures, folder: Path) -> NodeTraining:
        """The training, where it was left if it was; its cost is told."""
        device = self.base.patcher.load_device
        accelerator = Alone(device, self.computing)
        inputs = self.base, data, accelerator, folder / "generator.safetensors"

        def training_of(settings: Settings) -> NodeTraining:
            return NodeTraining(settings, *inputs, progress=self.progress, pictures=self.shown)

        training = training_of(self.settings)
        with fitting("A step of one picture", device, LESS_MEMORY):
            cost = estimate(self.base, training.method, self.settings, accelerator, self._size)
        if cost.too_many:
            raise MaskUNetError(
                f"{cost.too_many} pictures at once do not fit into the memory of {device} "
                f"({total_memory(device) / MB:,.0f} MB): {LESS_MEMORY}."
            )
        with _of_another_version(folder):
            state = read_torch(training.state_file) if training.state_file.exists() else None
            begun = state and json.loads(state["config"])["loop"]["steps"]
        if self.minutes:
            self.settings = self._settings(begun or max(1, round(60 * self.minutes / cost.seconds)))
            training = training_of(self.settings)
            self.progress.plan(self.settings.loop.steps)
        if state:
            with _of_another_version(folder):
                training.restore(state)
            self.progress.note(f"goes on from step {training.step}")
        steps = self.settings.loop.steps
        whole = in_words(cost.seconds * (steps - training.step))
        self.progress.note(f"estimated: {steps} steps, {cost.peak / MB:,.0f} MB at most on {device}, {whole}")
        if sentence := attention_notice(device):
            self.progress.note(sentence)
        return training

    def _saved(self, training: NodeTraining) -> Path:
        """Copies the best generator under the next free number."""
        path = self.files.save("The generator", self.name, partial(_copy, training.result))
        size = path.stat().st_size / 1e6
        self.progress.tell(f"Saved as {path.name} ({size:.1f} MB)", told_gain(training.best))
        return path


def _copy(file: Path, path: Path) -> None:
    with replacing(path) as temporary:
        shutil.copyfile(file, temporary)


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Around what writes into the folder."""
    try:
        yield
    except OSError as error:
        raise MaskUNetError(
            f"The training cannot be saved in '{folder}' ({error.strerror or error}). What was saved before is as it "
            "was: free some space on that disk, or make the folder writable, and run again."
        ) from None


@contextlib.contextmanager
def _of_another_version(folder: Path) -> Iterator[None]:
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError):
        raise MaskUNetError(
            f"The training that was begun in '{folder}' is of another version of ComfyUI-MaskUNet. Remove the folder "
            "and run again."
        ) from None
