"""The embedded toy model: a complete text-to-image model of 21 MB, for trying everything without a download."""

from comfy_api.latest import io

BODIES = {"U-Net": "unet", "transformer": "transformer"}
"""Choices of the node, with the names of the parts."""


class MaskUNetToyModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetToyModel",
            display_name="MaskUNet Toy Model",
            category="MaskUNet/toy model",
            description="A small real text-to-image model that comes with the extension. It draws one or two coloured "
            'shapes at 64x64, such as "a red circle left of a small blue square": red, green, blue, yellow, orange, '
            "purple, black or white; circle, square, triangle, star, ring or cross; small or large; left of, right of, "
            "above, below, and. It needs no download and runs in seconds on a CPU.",
            search_aliases=["toy checkpoint", "tiny model", "test model", "shapes", "load toy"],
            inputs=[
                io.Combo.Input(
                    "body",
                    options=list(BODIES),
                    default="U-Net",
                    optional=True,
                    tooltip="What draws: a U-Net as in Stable Diffusion, or a flow-matching transformer as in Flux. "
                    "Prompts, autoencoder and reward are the same for both.",
                )
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="Sample at 64x64, CFG 5, 15 steps or more."),
                io.Clip.Output("CLIP", tooltip="The toy text encoder. Words that it does not know do no harm."),
                io.Vae.Output("VAE", tooltip="The toy autoencoder: 8x8 compression, latents of 4 channels."),
            ],
        )

    @classmethod
    def execute(cls, body: str = "U-Net") -> io.NodeOutput:
        # Imported here: ComfyUI's start does not wait for it.
        from ..maskunet_core.toy.model import load_toy_model

        return io.NodeOutput(*load_toy_model(body=BODIES[body]))
