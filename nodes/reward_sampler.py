"""KSampler, and the custom sampler, with a search for masks inside: algorithm 1 of the paper."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io

from ..maskunet_core.choices import TARGETS
from ..maskunet_core.errors import MaskUNetError
from .reward_settings import PRESETS_IN_WORDS, advice_on, chosen_settings, custom_inputs
from .rewards import LoadedReward
from .types import MasksType, RewardType, ksampler_inputs

if TYPE_CHECKING:
    from .host_sampling import HostSampling


def search_inputs() -> list[io.Input]:
    """What a search takes besides what it draws with."""
    return [
        io.Vae.Input("vae", tooltip="Decodes the estimates that the reward looks at."),
        RewardType.Input("reward", tooltip="What is optimised, from MaskUNet Reward Loader or Combine."),
        io.String.Input(
            "prompt",
            multiline=True,
            default="",
            tooltip="The text that the reward compares the image with; usually that of the positive prompt.",
        ),
        io.Combo.Input(
            "preset",
            options=list(PRESETS_IN_WORDS),
            default="quality",
            tooltip="\n".join(f"{name}: {words}" for name, words in PRESETS_IN_WORDS.items()),
        ),
        io.Int.Input(
            "candidates",
            default=0,
            min=0,
            max=64,
            step=1,
            tooltip="Starting noises that are drawn and judged "
            "before the search goes on with the best. 0: as the preset says; 1: none.",
        ),
        io.Boolean.Input("masks", default=True, tooltip="Off: only the best of the candidates, without masks."),
        io.Float.Input(
            "target",
            default=0.0,
            min=-1000.0,
            max=1000.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="Reward that is good enough: an image that reaches it is left as it is. 0 for none; for a "
            "target of zero give 0.01 or -0.01.",
        ),
        io.Float.Input(
            "seconds",
            default=0.0,
            min=0.0,
            max=86400.0,
            step=1.0,
            optional=True,
            advanced=True,
            tooltip="Time budget of the updates, after which the image is finished plainly. 0 for none.",
        ),
        io.Combo.Input(
            "targets",
            options=list(TARGETS),
            default="decoder attention",
            optional=True,
            advanced=True,
            tooltip="Which linear layers are masked. The paper masks the attention of the decoder.",
        ),
        RewardType.Input(
            "watch",
            optional=True,
            tooltip="A second reward that is never optimised: it is drawn "
            "into the curve, to see whether the image really gets better.",
        ),
        io.Boolean.Input(
            "stop_by_watch",
            default=False,
            optional=True,
            advanced=True,
            tooltip="End the updates once the watched reward has fallen at two steps in a row.",
        ),
        io.Vae.Input(
            "gradient_vae",
            optional=True,
            tooltip="A small decoder (TAESD) for the estimates, to save time and memory. Finished images are "
            "still judged through `vae`.",
        ),
        *custom_inputs(),
        io.Float.Input(
            "attention_weight",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="For a model from MaskUNet Attention Guidance: so many times its loss is subtracted from the "
            "reward that masks are updated by. 0 asks the reward alone. See the help page before you raise it.",
        ),
    ]


def search_outputs() -> list[io.Output]:
    return [
        io.Latent.Output("LATENT", tooltip="The finished latents."),
        MasksType.Output(
            "MASKUNET_MASKS",
            tooltip="The masks that were found: MaskUNet Apply Masks repeats the "
            "image with them, at the price of plain sampling.",
        ),
        io.Image.Output(
            "reward_curve",
            tooltip="Reward of the estimated image at each update (thin) and as each step was taken (dots), "
            "and of the finished image.",
        ),
        io.Image.Output(
            "candidates",
            tooltip="For each image a sheet of all candidates, as they were judged, with seeds and scores; the "
            "chosen one is framed.",
        ),
        io.Int.Output(
            "seeds",
            is_output_list=True,
            tooltip="For each image the seed whose starting noise was chosen: with it and the masks the stock sampler "
            "draws the image again.",
        ),
    ]


def search(
    sampling: "Callable[[], HostSampling]",
    node_id: str,
    *,
    vae: Any,
    reward: LoadedReward,
    prompt: str,
    latent_image: dict,
    preset: str,
    candidates: int,
    masks: bool,
    target: float = 0.0,
    seconds: float = 0.0,
    targets: str = "decoder attention",
    watch: LoadedReward | None = None,
    stop_by_watch: bool = False,
    gradient_vae: Any = None,
    attention_weight: float = 0.0,
    **values: Any,
) -> io.NodeOutput:
    """The outputs of a search. sampling: makes what it draws with, see host_sampling. values: of `custom_inputs`."""
    others = {"masks": masks, "seconds": seconds, "attention_weight": attention_weight}
    settings = chosen_settings(preset, candidates, target, values, **others)
    if stop_by_watch and watch is None:
        raise MaskUNetError(
            "stop_by_watch is on, but there is no reward to watch. Connect one to 'watch', or switch it off."
        )
    # Gradients cannot flow through tensors that were made in the inference mode that nodes run in.
    with torch.inference_mode(False), torch.no_grad():
        from ..maskunet_core.seam.gradients import ordinary_tensors
        from .reward_curve import reward_curve
        from .reward_run import RewardRun

        drawn = sampling()
        run = RewardRun(
            sampling=drawn,
            vae=vae,
            gradient_vae=gradient_vae,
            reward=reward,
            watch=watch,
            prompt=prompt,
            latent=ordinary_tensors(latent_image),
            settings=settings,
            targets=targets,
            stop_by_watch=stop_by_watch,
            advice=advice_on(preset, drawn.record["cfg"]),
            node_id=node_id,
        )
        found = run.run()
        record = {"prompt": prompt, "reward": reward.reward.name, "preset": preset, "sampling": drawn.record}
        record |= {"settings": asdict(run.settings), "seeds": run.seeds, "seeds_suffice": run.seeds_suffice}
        record |= {"scores": None if found.scores is None else [round(float(s), 4) for s in found.scores]}
        found.recorded.record.update(record)
        output = {k: v for k, v in latent_image.items() if not k.startswith("downscale_ratio")}
        watched = watch.reward.name if watch else None
        curve = reward_curve(found, reward.reward.name, watched, settings.keep_best, run.candidate_scores)
        return io.NodeOutput(output | {"samples": found.latents}, found.recorded, curve, run.sheets(found), run.seeds)


class MaskUNetRewardSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetRewardSampler",
            display_name="MaskUNet Reward Sampler",
            category="MaskUNet/search",
            description="KSampler that makes the image follow a reward: before each step it looks at an estimate of "
            "the finished image, asks the reward, and switches weights of the model off by the reward's gradient. "
            "Nothing is trained beforehand, and the model is as before afterwards. It can also try several starting "
            "noises first and go on with the best.",
            search_aliases=[
                "quality",
                "prompt adherence",
                "better pictures",
                "improve",
                "best of n",
                "reward",
                "ImageReward",
                "HPSv2",
                "mask",
                "sampler",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="SD 1.5, SD 2.x, SDXL or the MaskUNet Toy Model, with any LoRAs. Masks are also searched "
                    "for on transformers (Z-Image, Flux, Krea 2, Qwen-Image, ...), which nobody has tried with "
                    "published weights yet.",
                ),
                *ksampler_inputs(
                    "Seed of the starting noise, as in KSampler. Candidates use the seeds after it.",
                    steps=15,
                    fewest=1,
                    sampler="dpmpp_2m",
                    about_samplers="Any sampler of ComfyUI. Those that look at each step once cost the least.",
                    scheduler="karras",
                    shown="image",
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The latent to start from. Each image of a batch is searched for on its own.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 keeps that much less of the latent's own content, as in KSampler.",
                ),
                *search_inputs(),
            ],
            outputs=search_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, positive, negative, **values: Any) -> io.NodeOutput:
        from .host_sampling import KSampling

        plan = {name: values.pop(name) for name in ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise")}
        return search(partial(KSampling, model, positive, negative, plan), cls.hidden.unique_id, **values)


class MaskUNetRewardSamplerCustom(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetRewardSamplerCustom",
            display_name="MaskUNet Reward Sampler (Custom)",
            category="MaskUNet/search",
            description="SamplerCustomAdvanced that makes the image follow a reward, as MaskUNet Reward Sampler does: "
            "for graphs with a guider, a sampler and noise levels of their own, as those of Flux and Qwen-Image.",
            search_aliases=["custom sampler", "guider", "sigmas", "flux", "best of n", "reward"],
            inputs=[
                io.Noise.Input(
                    "starting_noise",
                    tooltip="From Random Noise. Candidates use the seeds after that of the connected one.",
                ),
                io.Guider.Input(
                    "guider",
                    tooltip="Model and conditioning, such as Basic Guider or CFG Guider. Masks act on its model; those "
                    "of the positive branch alone need one of these two, with others they act on all branches.",
                ),
                io.Sampler.Input("sampler", tooltip="Any sampler. Those that look at each step once cost the least."),
                io.Sigmas.Input("sigmas", tooltip="The noise levels, from any scheduler. Each but the last is a step."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The latent to start from. Each image of a batch is searched for on its own.",
                ),
                *search_inputs(),
            ],
            outputs=search_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, starting_noise, guider, sampler, sigmas, **values: Any) -> io.NodeOutput:
        from .host_sampling import GuiderSampling

        return search(partial(GuiderSampling, starting_noise, guider, sampler, sigmas), cls.hidden.unique_id, **values)
