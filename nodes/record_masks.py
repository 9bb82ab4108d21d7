"""Record the masks of an ordinary sampling run."""

from comfy_api.latest import io

from .types import MasksType


class MaskUNetRecordMasks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetRecordMasks",
            display_name="MaskUNet Record Masks",
            category="MaskUNet/masks",
            description="Samplers that get this model keep the masks that acted at each step, together with the "
            "latent they give; connect that latent to MaskUNet Masks of Run. The image stays the same. For SD 1.5 a "
            "step takes up to 12 MB of memory per image, for as long as ComfyUI keeps the latent.",
            search_aliases=["record masks", "observe masks", "log masks", "inspect masks", "keep masks"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model with masks, from MaskUNet Apply, Random Mask or Apply Masks. Those may also "
                    "come after this node.",
                ),
            ],
            outputs=[io.Model.Output("MODEL", tooltip="The model to sample with. The input model stays as it was.")],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        from ..maskunet_core.records.recorder import recording

        return io.NodeOutput(recording(model))


class MaskUNetMasksOfRun(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetMasksOfRun",
            display_name="MaskUNet Masks of Run",
            category="MaskUNet/masks",
            description="The masks that acted while this latent was sampled, as MaskUNet Record Masks kept them: for "
            "MaskUNet Inspect, to save, or to replay. Each branch of guidance has its own, so that a replay with the "
            "same settings draws the same image (with samplers that look at each noise level once).",
            search_aliases=["recorded masks", "masks from latent", "take masks", "extract masks", "inspect masks"],
            inputs=[
                io.Latent.Input(
                    "latent",
                    tooltip="Straight from the sampler, which got its model through MaskUNet Record Masks.",
                ),
            ],
            outputs=[
                MasksType.Output(
                    "MASKUNET_MASKS",
                    tooltip="The masks of this very run, for MaskUNet Inspect, Save Masks and Apply Masks. They hold "
                    "what is kept and removed, not the strength.",
                ),
            ],
        )

    @classmethod
    def execute(cls, latent: dict) -> io.NodeOutput:
        from ..maskunet_core.records.recorder import masks_of_run

        return io.NodeOutput(masks_of_run(latent["samples"]))
