"""Text2Video-Zero: frames that look at a common frame, and a sampler that draws the frames of a video."""

from comfy_api.latest import io
from torch import Tensor

from ..maskunet_core.choices import FIRST, MOTION_SIDE, REFERENCES
from ..maskunet_core.errors import MaskUNetError
from .types import ksampler_inputs, window_inputs

_SHARE_MASKS = (
    "On: a mask generator looks at the first frame alone, and all frames get its masks. Off: each frame has masks of "
    "its own. Other masks, such as recorded ones, act as they do without this."
)


class MaskUNetCrossFrame(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetCrossFrame",
            display_name="MaskUNet Cross-Frame Attention",
            category="MaskUNet/video",
            description="Takes a batch for the frames of one video: where a picture would attend to itself, all attend "
            "to the first, so the same things look the same in all of them. ControlNets are treated alike: with one "
            "pose or depth picture per frame and the same noise for all it is Text2Video-Zero under control. The model "
            "itself is never changed.",
            search_aliases=["video", "text2video-zero", "consistent images", "cross attention", "series", "animation"],
            inputs=[
                io.Model.Input("model", tooltip="SD 1.5, SD 2.x, SDXL or the toy model, with any LoRAs and masks."),
                io.Combo.Input(
                    "reference",
                    options=list(REFERENCES),
                    default=FIRST,
                    tooltip="The frame that the others attend to. first: as published. previous: each attends to the "
                    "frame before it.",
                ),
                *window_inputs("frames attend to others"),
                io.Boolean.Input("share_masks", default=True, optional=True, advanced=True, tooltip=_SHARE_MASKS),
            ],
            outputs=[io.Model.Output("MODEL", tooltip="The model to sample with. The input model stays as it was.")],
        )

    @classmethod
    def execute(
        cls, model, reference: str, start_percent: float, end_percent: float, share_masks: bool = True
    ) -> io.NodeOutput:
        from ..maskunet_core.video.cross_frame import CrossFrameAttention

        return io.NodeOutput(CrossFrameAttention(reference, start_percent, end_percent, share_masks).crossing(model))


class MaskUNetVideoSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetVideoSampler",
            display_name="MaskUNet Video Sampler",
            category="MaskUNet/video",
            description="KSampler that draws a short video with a model of pictures (Text2Video-Zero): the first frame "
            "is what KSampler draws, the others begin as the same latent, moved a little further each. Nothing is "
            "trained. Decode the frames with VAE Decode, and join them with Create Video.",
            search_aliases=["video", "text2video-zero", "text to video", "animation", "frames", "sampler"],
            inputs=[
                io.Model.Input("model", tooltip="SD 1.5, SD 2.x, SDXL or the toy model, with any LoRAs and masks."),
                *ksampler_inputs(
                    "Seed of the starting noise, as in KSampler. Each frame's own noise comes from it, too.",
                    steps=50,
                    fewest=2,
                    sampler="ddim",
                    about_samplers="ddim as published. One that adds noise of its own needs all frames in one chunk.",
                    scheduler="ddim_uniform",
                    shown="video",
                ),
                io.Latent.Input("latent_image", tooltip="One empty latent, of the size of a frame."),
                io.Int.Input(
                    "frames",
                    default=8,
                    min=1,
                    max=1000,
                    step=1,
                    tooltip="How many frames the video has, KSampler's picture first.",
                ),
                _motion_input("x", "left"),
                _motion_input("y", "up"),
                io.Int.Input(
                    "chunk",
                    default=8,
                    min=2,
                    max=1000,
                    step=1,
                    optional=True,
                    advanced=True,
                    tooltip="How many frames are drawn together, the first among them each time. Fewer take less "
                    "memory and draw the same.",
                ),
                _level_input("t1_percent", 0.058, "up to which the frames get noise of their own (T1, t = 941)"),
                _level_input("t0_percent", 0.118, "at which the first frame is moved to give the others (T0, t = 881)"),
                io.Mask.Input(
                    "foreground",
                    optional=True,
                    tooltip="What moves before a background: one mask, which moves along, or one for each frame. The "
                    "background is held steady by the first frame's.",
                ),
                io.Boolean.Input(
                    "cross_frame",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="On: all frames attend to the first. Off: only what a connected MaskUNet Cross-Frame "
                    "Attention does.",
                ),
                io.Boolean.Input("share_masks", default=True, optional=True, advanced=True, tooltip=_SHARE_MASKS),
            ],
            outputs=[io.Latent.Output("LATENT", tooltip="The frames, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive,
        negative,
        latent_image: dict,
        frames: int,
        motion_x: float,
        motion_y: float,
        chunk: int = 8,
        t1_percent: float = 0.058,
        t0_percent: float = 0.118,
        foreground: Tensor | None = None,
        cross_frame: bool = True,
        share_masks: bool = True,
    ) -> io.NodeOutput:
        from ..maskunet_core.video.cross_frame import CrossFrameAttention
        from ..maskunet_core.video.motion import Motion
        from ..maskunet_core.video.sampling import VideoSettings, draw_video
        from .video_run import FrameSampler

        crossed = CrossFrameAttention(share_masks=share_masks).crossing(model)
        if t1_percent > t0_percent:
            raise MaskUNetError(
                f"t1_percent ({t1_percent}) lies after t0_percent ({t0_percent}), but frames get noise back after they "
                "were moved. Set t1_percent to the smaller of the two."
            )
        if foreground is not None and len(foreground) not in (1, frames):
            raise MaskUNetError(
                f"foreground has {len(foreground)} masks for {frames} frames. Connect one mask, or one for each frame."
            )
        level = model.get_model_object("model_sampling").percent_to_sigma
        motion = Motion(motion_x, motion_y)
        settings = VideoSettings(frames, chunk, motion, seed, level(t1_percent), level(t0_percent))
        sampling = {"steps": steps, "cfg": cfg, "sampler_name": sampler_name, "scheduler": scheduler}
        sampling |= {"positive": positive, "negative": negative, "seed": seed}
        run = FrameSampler(crossed if cross_frame else model, latent_image, sampling, settings)
        return io.NodeOutput(
            {"samples": run.format.process_out(draw_video(run.draw, run.sigmas, settings, foreground))}
        )


def _motion_input(axis: str, towards: str) -> io.Input:
    return io.Float.Input(
        f"motion_{axis}",
        default=12.0,
        min=-MOTION_SIDE,
        max=MOTION_SIDE,
        step=0.5,
        tooltip=f"How far the picture moves {towards} from frame to frame, in pixels of a picture of 512; of larger "
        "ones it is the same share. Published: -20 to 20. The toy model's cells are 64 wide.",
    )


def _level_input(name: str, default: float, meaning: str) -> io.Input:
    return io.Float.Input(
        name,
        default=default,
        min=0.0,
        max=1.0,
        step=0.001,
        optional=True,
        advanced=True,
        tooltip=f"The point of sampling {meaning}: 0 is pure noise, 1 the end. The nearest step counts.",
    )
