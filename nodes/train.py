"""Train a mask generator on pictures, in the graph."""

from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..maskunet_core.choices import TARGETS
from ..maskunet_core.errors import MaskUNetError
from .folders import MASKUNET
from .pictures import coloured, to_pillow
from .saving import NumberedFiles
from .types import MaskUNetType, seed_input

DEFAULT_NAME = "my_training"
GOALS_IN_WORDS = {
    "subject": "a thing, an animal or a person of your own, from 5 to 20 pictures.",
    "style": "how pictures look, from 10 to 50 pictures.",
    "general": "what a model draws anyway, better, from hundreds of pictures.",
}
FILES = NumberedFiles(
    lambda: folder_paths.get_folder_paths(MASKUNET)[0],
    place="models/maskunet",
    input_name="name",
    usual=DEFAULT_NAME,
    unwritable="Make the folder models/maskunet writable.",
)


def captions_of(texts: list[str], pictures: int) -> list[str]:
    """A caption for each picture: of a list, of the lines of one text, or one for all. Raises MaskUNetError."""
    found = [line.strip() for line in texts[0].strip().splitlines()] or [""] if len(texts) == 1 else texts
    if len(found) == 1:
        return found * pictures
    if len(found) != pictures:
        raise MaskUNetError(
            f"There are {len(found)} captions for {pictures} pictures. Give one for all, or one for each in a line of "
            "its own."
        )
    return found


class MaskUNetTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetTrain",
            display_name="MaskUNet Train",
            category="MaskUNet/generator",
            description="Trains a mask generator on your own pictures and saves it in models/maskunet. The model "
            "itself is never changed. An interrupted training is saved, and the same inputs go on from there.",
            search_aliases=[
                "train",
                "training",
                "fine-tune",
                "finetune",
                "dreambooth",
                "train lora",
                "style",
                "subject",
            ],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="What is trained for: SD 1.5, SD 2.x, SDXL, the MaskUNet Toy Model, or a transformer. "
                    "LoRAs before this node act; what other nodes put around the model does not.",
                ),
                io.Clip.Input("clip", tooltip="The model's text encoder, which reads the captions."),
                io.Vae.Input("vae", tooltip="Encodes the pictures, once."),
                io.Image.Input(
                    "images",
                    tooltip="The pictures: a batch, or a list of any sizes as Load Image Dataset from Folder gives it. "
                    "They are scaled to the resolution, and cut to the nearest aspect ratio of a few.",
                ),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    tooltip="What the pictures show: one text for all, a line for each, or a list of texts. A "
                    "subject or style of your own is best named by a rare word.",
                ),
                io.Combo.Input(
                    "goal",
                    options=list(GOALS_IN_WORDS),
                    default="subject",
                    tooltip="\n".join(f"{name}: {words}" for name, words in GOALS_IN_WORDS.items()),
                ),
                io.Int.Input(
                    "steps",
                    default=800,
                    min=1,
                    max=1_000_000,
                    step=1,
                    tooltip="Steps of the training. In fewer steps it learns at a higher rate.",
                ),
                io.String.Input(
                    "name",
                    default=DEFAULT_NAME,
                    tooltip="Name of the file in models/maskunet; a number is added, so that no file is overwritten.",
                ),
                seed_input("Seed of the training: which pictures and noises a step sees.", fixed=True, advanced=True),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    advanced=True,
                    tooltip="Side of a square of the pictures' area in pixels. 0: 64 for the toy models, 512 for SD "
                    "1.5 and SD 2.x, else 1024.",
                ),
                io.Int.Input(
                    "batch",
                    default=0,
                    min=0,
                    max=1024,
                    step=1,
                    advanced=True,
                    tooltip="Pictures per step, computed one after another. 0: as the goal says.",
                ),
                io.Float.Input(
                    "rate",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.0001,
                    round=0.00001,
                    advanced=True,
                    tooltip="Learning rate of the masks' biases; the rest learns at a tenth of it. 0: as the goal "
                    "says, higher where the steps are few.",
                ),
                io.Int.Input(
                    "held_out",
                    default=-1,
                    min=-1,
                    max=10_000,
                    step=1,
                    advanced=True,
                    tooltip="Pictures that are not trained on but measured, at most a fifth of all: the file is "
                    "the best by their loss. 0: none, and the file is the last state. -1: as the goal says.",
                ),
                io.Combo.Input(
                    "targets",
                    options=list(TARGETS),
                    default="decoder attention",
                    advanced=True,
                    tooltip="Which linear layers are masked. The paper masks the attention of the decoder.",
                ),
                io.Float.Input(
                    "minutes",
                    default=0.0,
                    min=0.0,
                    max=100_000.0,
                    step=1.0,
                    round=0.01,
                    tooltip="As many steps as fit into so many minutes on this machine, in the place of 'steps'. "
                    "0: as many as 'steps' says.",
                ),
                io.Int.Input(
                    "pictures",
                    default=2,
                    min=0,
                    max=16,
                    step=1,
                    advanced=True,
                    tooltip="So many captions are drawn before, three times on the way, and after, from the same "
                    "noises. The training does not change by it. 0: none.",
                ),
                io.Float.Input(
                    "picture_cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    advanced=True,
                    tooltip="Classifier-free guidance of these pictures. 1 for Flux, Turbo and Lightning models.",
                ),
            ],
            outputs=[
                MaskUNetType.Output("MASKUNET", tooltip="What was trained, for MaskUNet Apply."),
                io.String.Output("file_name", tooltip="Its file, as MaskUNet Loader lists it."),
                io.Image.Output(
                    "loss_curve", tooltip="The loss of each step, and the held-out loss beside the base's."
                ),
                io.Image.Output("before_after", tooltip="The same noises without masks and with those of the file."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, **lists: list[Any]) -> io.NodeOutput:
        images, texts = lists.pop("images"), lists.pop("captions")
        # The others are lists of one.
        others = {name: values[0] for name, values in lists.items()}
        return _train(images, texts, **others, node_id=cls.hidden.unique_id)


def _train(
    images: list[Tensor],
    texts: list[str],
    *,
    model: Any,
    clip: Any,
    vae: Any,
    goal: str,
    steps: int,
    name: str,
    seed: int,
    resolution: int,
    batch: int,
    rate: float,
    held_out: int,
    targets: str,
    minutes: float = 0.0,
    pictures: int = 2,
    picture_cfg: float = 5.0,
    node_id: str | None,
) -> io.NodeOutput:
    # Half of what the extension would take to import: ComfyUI's start does not wait for it.
    from ..maskunet_core.training.goals import settings_of, usual_resolution
    from ..maskunet_core.training.lent import LentModel
    from .train_run import TrainRun

    trained_on = [to_pillow(picture) for image in images for picture in coloured(image, "images")]
    # Gradients cannot flow through tensors that were made in the inference mode that nodes run in.
    with torch.inference_mode(False), torch.enable_grad():
        base = LentModel.of(model, clip, vae)
        base.require_trainable()
        resolution = resolution or usual_resolution(base)
        run = TrainRun(
            base,
            trained_on,
            captions_of(texts, len(trained_on)),
            settings_for=lambda steps: settings_of(goal, steps, seed, targets, resolution, batch, rate, held_out),
            steps=steps,
            minutes=minutes,
            resolution=resolution,
            name=FILES.named(name),
            files=FILES,
            shown=pictures,
            cfg=picture_cfg,
            node_id=node_id,
        )
        generator, path, curve, before_after = run.run()
    return io.NodeOutput(generator, Path(path).relative_to(FILES.root()).as_posix(), curve, before_after)
