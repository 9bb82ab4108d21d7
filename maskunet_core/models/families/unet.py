"""ComfyUI's UNetModel: SD 1.5, SD 2.x, SDXL and the toy model."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from .family import Embed, Family, Stage, Target

_TEMPORAL = ".time_stack."
"""Layers of video models in which a row is a place in the picture, seen over time: rows of a sample lie apart."""


class _UNet(Family):
    marks = ("input_blocks", "output_blocks", "num_res_blocks", "time_embed")
    names = {
        "SD15": "SD 1.5",
        "SD15_instructpix2pix": "SD 1.5",
        "SD20": "SD 2.x",
        "SD21UnclipL": "SD 2.x",
        "SD21UnclipH": "SD 2.x",
        "SDXL": "SDXL",
        "SDXL_instructpix2pix": "SDXL",
        "SDXLRefiner": "SDXL refiner",
        "MaskUNetToy": "the MaskUNet toy model",
    }
    attention = tuple(
        Target(f"{attention}.{layer}")
        for attention in ("attn1", "attn2")
        for layer in ("to_q", "to_k", "to_v", "to_out.0")
    )
    feed_forward = (Target("ff.net.0.proj"), Target("ff.net.2"))

    def embedding(self, diffusion_model: nn.Module) -> int:
        return diffusion_model.time_embed[2].out_features

    def stages(self, diffusion_model: nn.Module) -> Iterator[Stage]:
        """Levels as diffusers counts them: `up.0` is the deepest of the decoder, `down.0` the first of the encoder."""

        def stage(third: str, name: str, anchor: str, prefixes: tuple[str, ...]) -> Stage:
            return Stage(name, third, anchor, prefixes, diffusion_model.get_submodule(anchor).channels)

        first = 1
        for level, count in enumerate(diffusion_model.num_res_blocks):
            blocks = tuple(f"input_blocks.{first + n}." for n in range(count))
            yield stage("down", f"down.{level}", f"input_blocks.{first}.0", blocks)
            first += count + 1
        if diffusion_model.middle_block is not None:
            yield stage("mid", "mid", "middle_block.0", ("middle_block.",))
        first = 0
        for level, count in enumerate(reversed(diffusion_model.num_res_blocks)):
            blocks = tuple(f"output_blocks.{first + n}." for n in range(count + 1))
            yield stage("up", f"up.{level}", f"output_blocks.{first}.0", blocks)
            first += count + 1

    def is_idle(self, diffusion_model: nn.Module, layer: str) -> bool:
        return _TEMPORAL in layer

    def conditions(self, args: tuple, kwargs: Mapping, embed: Embed) -> tuple[Tensor, Tensor]:
        """What enters a ResBlock."""
        return args[0], args[1]


UNET = _UNet()


def execution_order(unet: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, block) of ComfyUI's UNetModel: the host goes through the layers of a block one by one."""
    encoder = [(f"input_blocks.{n}", block) for n, block in enumerate(unet.input_blocks)]
    middle = [] if unet.middle_block is None else [("middle_block", unet.middle_block)]
    decoder = [(f"output_blocks.{n}", block) for n, block in enumerate(unet.output_blocks)]
    return [*encoder, *middle, *decoder]


def anchor_channels(unet: nn.Module, anchor: str) -> tuple[int, int]:
    """(out, in) channels of the first convolution of a ResBlock, which diffusers calls `conv1`."""
    convolution = unet.get_submodule(anchor).in_layers[2]
    return convolution.out_channels, convolution.in_channels
