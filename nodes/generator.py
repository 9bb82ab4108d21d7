"""Load a trained mask generator and apply it to a model."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import folder_paths
from comfy_api.latest import io

from .folders import MASKUNET
from .types import MaskUNetType, seed_input, strength_input, window_inputs

if TYPE_CHECKING:
    from .loaded_generator import LoadedGenerator


def file_stamp(path: str) -> tuple[int, int]:
    """Differs when a file was written over: time in nanoseconds and size."""
    state = os.stat(path)
    return state.st_mtime_ns, state.st_size


class MaskUNetLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetLoader",
            display_name="MaskUNet Loader",
            category="MaskUNet/generator",
            description="Loads a mask generator that was trained with `python -m trainer`. The files lie in "
            "models/maskunet. Three for the MaskUNet Toy Model come with the extension: toy_follows makes pictures "
            "without guidance (CFG 1) follow the prompt more often, toy_shapes changes little; for its transformer, "
            "toy_transformer_style draws before a rosy background.",
            search_aliases=["mask generator", "load maskunet", "mask unet checkpoint"],
            inputs=[
                io.Combo.Input(
                    "maskunet_name",
                    options=folder_paths.get_filename_list(MASKUNET),
                    tooltip="Generator file in models/maskunet. It fits the model family it was trained for.",
                ),
            ],
            outputs=[MaskUNetType.Output("MASKUNET", tooltip="The mask generator, for MaskUNet Apply.")],
        )

    @classmethod
    def validate_inputs(cls, maskunet_name: str | None) -> bool | str:
        """Replaces the host's own check of the list, which would not say where generators come from."""
        if maskunet_name is None or maskunet_name in folder_paths.get_filename_list(MASKUNET):
            return True
        return (
            f"'{maskunet_name}' is not in models/maskunet. Put a generator file there and press R; `python -m trainer "
            "train` makes one from pictures with captions. Without a generator, MaskUNet Reward Sampler finds masks."
        )

    @classmethod
    def fingerprint_inputs(cls, maskunet_name: str) -> tuple[int, int]:
        return file_stamp(folder_paths.get_full_path_or_raise(MASKUNET, maskunet_name))

    @classmethod
    def execute(cls, maskunet_name: str) -> io.NodeOutput:
        from ..maskunet_core.files.checkpoint import load
        from .loaded_generator import LoadedGenerator

        path = folder_paths.get_full_path_or_raise(MASKUNET, maskunet_name)
        return io.NodeOutput(LoadedGenerator(load(Path(path))))


class MaskUNetApply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetApply",
            display_name="MaskUNet Apply",
            category="MaskUNet/generator",
            description="Masks weights of the model's linear layers while it samples, chosen anew by the generator for "
            "every step and every image. The model itself is never changed: bypass or delete this node and it is as "
            "before. Several of these nodes in a row keep what all of them keep.",
            search_aliases=["mask weights", "masked unet", "enhance model"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with. LoRAs may come before or after this node."),
                MaskUNetType.Input("maskunet", tooltip="The generator, from MaskUNet Loader."),
                strength_input(),
                *window_inputs(),
                io.Boolean.Input(
                    "stochastic",
                    default=False,
                    tooltip="Off: each weight takes its likelier side, so the same seed gives the same image. On: "
                    "weights are drawn by their probability with the seed below.",
                ),
                seed_input(
                    "Seed of the draw in stochastic mode. The sampler's own noise does not depend on it.",
                    fixed=True,
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output("MODEL", tooltip="The model with masks. The input model stays as it was.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        maskunet: "LoadedGenerator",
        strength: float,
        start_percent: float,
        end_percent: float,
        stochastic: bool,
        seed: int,
    ) -> io.NodeOutput:
        from ..maskunet_core.masks.sources import GeneratorMasks
        from ..maskunet_core.seam.attach import attach, structure_of

        maskunet.file.require_fit(structure_of(model, maskunet.file.targets))
        generator, patcher = maskunet.in_dtype(model.model.get_dtype_inference())
        source = GeneratorMasks(generator, seed=seed if stochastic else None)
        return io.NodeOutput(attach(model, source, strength, start_percent, end_percent, weights=patcher))
