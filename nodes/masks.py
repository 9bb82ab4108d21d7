"""Recorded masks: apply them to a model, save them, load them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
from comfy_api.latest import io

from .folders import MASKS, SAVED_MASKS, fingerprint
from .node_text import tell
from .saving import NumberedFiles
from .types import MasksType, strength_input

if TYPE_CHECKING:
    from ..maskunet_core.records.recorded import RecordedMasks

DEFAULT_PREFIX = f"{SAVED_MASKS}/maskunet"
OUTPUT = NumberedFiles(
    folder_paths.get_output_directory,
    place="the output folder",
    input_name="filename_prefix",
    usual=DEFAULT_PREFIX,
    unwritable="Make the output folder writable, or start ComfyUI with another --output-directory.",
)


def seeds_in_words(seeds: list[int]) -> str:
    """The seeds of a batch's images: "seed 3", or "seeds 3, 5 (image by image)" where they differ."""
    if len(set(seeds)) == 1:
        return f"seed {seeds[0]}"
    return f"seeds {', '.join(map(str, seeds))} (image by image)"


def not_by_seeds(sampler_name: str, latent_lr: float, drawer: str) -> str:
    """Why the seeds and masks of a search do not draw its images again by `drawer`, and what does."""
    drawer = drawer[0].upper() + drawer[1:]
    if latent_lr:
        return (
            f"{drawer} draws other images from this, because latent_lr changed the noisy latents, which masks do not "
            "record. To have them again, save the latents, or search with latent_lr 0"
        )
    return (
        f"{drawer} draws other images from these seeds: the images were drawn as one batch, and {sampler_name} does "
        "not draw each image of a batch for itself. To have them again, save the latents, or search with a batch of one"
    )


def how_to_draw_again(record: dict[str, Any]) -> str | None:
    """What the stock sampler needs beside the masks, by the record of a search; None where none tells."""
    seeds = record.get("seeds")
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        return None
    drawer = str(_entry(record, "sampling", "drawn_by") or "KSampler")
    # Older files do not tell whether that is enough.
    if record.get("seeds_suffice", True):
        return f"To draw this again, give {drawer} {seeds_in_words(seeds)}"
    sampler = _entry(record, "sampling", "sampler_name") or "the sampler"
    return (
        f"Found from {seeds_in_words(seeds)}. {not_by_seeds(sampler, _entry(record, 'settings', 'latent_lr'), drawer)}"
    )


def _entry(record: dict[str, Any], part: str, name: str) -> Any:
    """What a record says, None where the file says nothing or something else."""
    entries = record.get(part)
    return entries.get(name) if isinstance(entries, dict) else None


class MaskUNetApplyMasks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetApplyMasks",
            display_name="MaskUNet Apply Masks",
            category="MaskUNet/masks",
            description="Replays masks that were found for one run: each step takes those of the recorded step whose "
            "noise level is nearest. The same settings and seed repeat the run; other samplers, step counts, prompts "
            "and sizes work too. The model itself is never changed.",
            search_aliases=[
                "replay masks",
                "recorded masks",
                "reuse masks",
                "mask weights",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with, of the family the masks were recorded on."),
                MasksType.Input(
                    "masks",
                    tooltip="Recorded masks. Those of one image fit any batch; those of several images fit batches of "
                    "the same size.",
                ),
                strength_input(),
            ],
            outputs=[io.Model.Output("MODEL", tooltip="The model with masks. The input model stays as it was.")],
        )

    @classmethod
    def execute(cls, model, masks: "RecordedMasks", strength: float) -> io.NodeOutput:
        from ..maskunet_core.records.recorded import RecordedSource
        from ..maskunet_core.seam.attach import attach, structure_of

        masks.require_fit(structure_of(model, masks.targets))
        return io.NodeOutput(attach(model, RecordedSource(masks), strength, 0.0, 1.0))


class MaskUNetSaveMasks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetSaveMasks",
            display_name="MaskUNet Save Masks",
            category="MaskUNet/masks",
            description="Saves recorded masks to the output folder, together with how they were found. For SD 1.5 a "
            "step takes up to 6 MB per image.",
            search_aliases=["export masks", "store masks", "keep masks"],
            is_output_node=True,
            inputs=[
                MasksType.Input("masks", tooltip="The masks to save, with the record of how they were found."),
                io.String.Input(
                    "filename_prefix",
                    default=DEFAULT_PREFIX,
                    tooltip="Name of the file in the output folder; a number is added, so that no file is overwritten. "
                    f"Files in {SAVED_MASKS}/ are listed by MaskUNet Load Masks at once, others when they were moved "
                    "to models/maskunet_masks.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, masks: "RecordedMasks", filename_prefix: str) -> io.NodeOutput:
        from ..maskunet_core.files import mask_file

        path = OUTPUT.save("The masks", OUTPUT.named(filename_prefix), lambda path: mask_file.save(path, masks))
        subfolder = Path(os.path.relpath(path.parent, folder_paths.get_output_directory()))
        saved = {"filename": path.name, "subfolder": "" if subfolder == Path() else str(subfolder), "type": "output"}
        size = path.stat().st_size / 1e6
        text = [f"Saved as {(subfolder / path.name).as_posix()} ({size:.1f} MB)"]
        again = how_to_draw_again(masks.record)
        text += [again] if again else []
        tell("\n".join(text), cls.hidden.unique_id)
        return io.NodeOutput(ui={"masks": [saved], "text": text})


class MaskUNetLoadMasks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetLoadMasks",
            display_name="MaskUNet Load Masks",
            category="MaskUNet/masks",
            description="Loads recorded masks. The files lie in models/maskunet_masks, or where MaskUNet Save Masks "
            f"puts them, in {SAVED_MASKS}/ of the output folder.",
            search_aliases=["import masks", "open masks", "recorded masks"],
            inputs=[
                io.Combo.Input(
                    "masks_name",
                    options=folder_paths.get_filename_list(MASKS),
                    tooltip=f"File in models/maskunet_masks or in {SAVED_MASKS}/ of the output folder. Press R to see "
                    "new files.",
                ),
            ],
            outputs=[MasksType.Output("MASKUNET_MASKS", tooltip="The masks, for MaskUNet Apply Masks.")],
        )

    @classmethod
    def validate_inputs(cls, masks_name: str | None) -> bool | str:
        """Replaces the host's own check of the list, which would not say where masks come from."""
        if masks_name is None or masks_name in folder_paths.get_filename_list(MASKS):
            return True
        return (
            f"'{masks_name}' is neither in models/maskunet_masks nor in {SAVED_MASKS}/ of the output folder. Put it "
            "into one of them and press R, or make one with MaskUNet Save Masks."
        )

    @classmethod
    def fingerprint_inputs(cls, masks_name: str) -> list[list[int]]:
        return fingerprint(folder_paths.get_full_path_or_raise(MASKS, masks_name))

    @classmethod
    def execute(cls, masks_name: str) -> io.NodeOutput:
        from ..maskunet_core.files import mask_file

        return io.NodeOutput(mask_file.load(Path(folder_paths.get_full_path_or_raise(MASKS, masks_name))))
