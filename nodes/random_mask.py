"""Random masks: what a mask does to a model before anything is learned."""

from comfy_api.latest import io

from ..maskunet_core.choices import TARGETS
from .types import seed_input, window_inputs


class MaskUNetRandomMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetRandomMask",
            display_name="MaskUNet Random Mask",
            category="MaskUNet/masks",
            description="Removes weights at random while the model samples, as in figure 1 of the MaskUNet paper: some "
            "masks give a better image than all weights do, most do not. Shows what there is to learn; it needs no "
            "generator and works on SD 1.5, SD 2.x and SDXL. It also works on transformers (Z-Image, Flux, Krea 2, "
            "Qwen-Image, Anima, SD 3), whose published weights nobody has tried it with yet.",
            search_aliases=["random mask", "drop weights", "prune", "variation", "maskunet figure 1"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                io.Float.Input(
                    "keep_ratio",
                    default=0.99,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Share of the weights that stay; 1 changes nothing. Begin at 0.99. The toy model bears "
                    "more: it shows little above 0.9.",
                ),
                seed_input("Seed of the masks. The sampler's own noise does not depend on it.", fixed=True),
                io.Combo.Input(
                    "targets",
                    options=list(TARGETS),
                    default="decoder attention",
                    tooltip="Which linear layers are masked. The paper masks the attention of the decoder, for which "
                    "the last third of a transformer's blocks is taken.",
                ),
                io.Boolean.Input(
                    "per_step",
                    default=True,
                    tooltip="On: another mask at every sampling step. Off: one mask for the whole run.",
                ),
                *window_inputs(),
            ],
            outputs=[io.Model.Output("MODEL", tooltip="The model with masks. The input model stays as it was.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        keep_ratio: float,
        seed: int,
        targets: str,
        per_step: bool,
        start_percent: float,
        end_percent: float,
    ) -> io.NodeOutput:
        from ..maskunet_core.masks.sources import RandomMasks
        from ..maskunet_core.seam.attach import attach, structure_of

        source = RandomMasks(structure_of(model, targets), keep_ratio, seed, per_step)
        return io.NodeOutput(attach(model, source, 1.0, start_percent, end_percent))
