"""Show what recorded masks do to one's own model and prompt: figures 1 and 8 of the paper."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.utils
from comfy_api.latest import io
from torch import Tensor

from ..maskunet_core.choices import GUIDANCE
from .types import MasksType

if TYPE_CHECKING:
    from ..maskunet_core.records.recorded import RecordedMasks


class MaskUNetInspect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetInspect",
            display_name="MaskUNet Inspect",
            category="MaskUNet/masks",
            description="Shows what masks do: how many weights each layer keeps at each step, how that changes over "
            "time, whether small or large weights are removed, and where two prompts or seeds get different masks. "
            "Diagrams need matplotlib where ComfyUI runs; the table does not.",
            search_aliases=["inspect masks", "mask statistics", "keep ratio", "heat map", "histogram", "compare masks"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that the masks were recorded on: its weights are what the histograms show. "
                    "LoRAs count, masks on it do not.",
                ),
                MasksType.Input(
                    "masks",
                    tooltip="Recorded masks: from MaskUNet Masks of Run, Reward Sampler or Load Masks.",
                ),
                io.Int.Input(
                    "sample",
                    default=0,
                    min=0,
                    max=4095,
                    step=1,
                    tooltip="Which image of the recorded batch; 0 is the first.",
                ),
                io.Combo.Input(
                    "branch",
                    options=list(GUIDANCE),
                    default=GUIDANCE[0],
                    tooltip="Masks of which branch of classifier-free guidance: with the positive prompt, or with the "
                    "negative. A generator gives each its own.",
                ),
                MasksType.Input(
                    "other_masks",
                    optional=True,
                    tooltip="Masks to compare with, of another prompt or seed: recorded on the same model. Each step "
                    "is compared with that of the nearest noise level.",
                ),
                io.Int.Input(
                    "other_sample",
                    default=0,
                    min=0,
                    max=4095,
                    step=1,
                    optional=True,
                    tooltip="Which image of the other batch. Connect one recording to both inputs to compare two "
                    "images of a batch.",
                ),
            ],
            outputs=[
                io.Image.Output("keep_ratio", tooltip="Weights kept per layer (rows) and sampling step (columns)."),
                io.Image.Output(
                    "over_time",
                    tooltip="Keep ratio of each block over the steps, and how many weights are switched between "
                    "neighbouring steps.",
                ),
                io.Image.Output(
                    "histograms", tooltip="How many weights of which magnitude are kept and removed, and what share."
                ),
                io.Image.Output(
                    "difference", tooltip="Per layer and step, the weights that just one of the two recordings keeps."
                ),
                io.String.Output(
                    "table",
                    tooltip="All numbers as tab-separated text for a spreadsheet: a line per layer and step, shares "
                    "from 0 to 1.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        masks: "RecordedMasks",
        sample: int,
        branch: str,
        other_masks: "RecordedMasks | None" = None,
        other_sample: int = 0,
    ) -> io.NodeOutput:
        from ..maskunet_core.records.statistics import ImageMasks, mask_statistics, to_table, weight_statistics
        from ..maskunet_core.seam.attach import structure_of
        from ..maskunet_core.seam.layers import presented_weights
        from .mask_plots import difference_map, keep_map, time_curves, weight_histograms

        masks.require_fit(structure_of(model, masks.targets))
        other = None if other_masks is None else ImageMasks(other_masks, other_sample, branch, "other_masks")
        chosen = ImageMasks(masks, sample, branch)
        bits = mask_statistics(chosen, other)
        weights = weight_statistics(
            chosen, _with_progress(presented_weights(model, masks.layers), 2 * len(masks.layers))
        )
        subject = f"image {sample}, {branch} branch" if masks.images > 1 else f"{branch} branch"
        compared = f"'masks' and 'other_masks' ({branch} branch)"
        return io.NodeOutput(
            keep_map(bits, subject),
            time_curves(bits, subject),
            weight_histograms(weights, subject),
            difference_map(bits, compared),
            to_table(bits, weights),
        )


def _with_progress(weight_of: Callable[[str], Tensor], total: int) -> Callable[[str], Tensor]:
    """The node's bar moves with each weight that is asked for, and a cancel is heeded."""
    bar = comfy.utils.ProgressBar(total)

    def told(layer: str) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(1)
        return weight_of(layer)

    return told
