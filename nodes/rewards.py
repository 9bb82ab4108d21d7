"""Load rewards, combine them, and score pictures with them."""

import json
import logging
import math
import re
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..maskunet_core.rewards.preprocess import letterbox
from ..maskunet_core.rewards.reward import WORK, BoundModel, BoundReward, CombinedReward, Reward
from .folders import REWARD, fingerprint
from .legend import captioned
from .node_text import tell, words_in_a_line
from .patchers import whole_patcher
from .pictures import coloured
from .types import RewardType

TOY_REWARD = "toy reward (bundled)"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CROP, LETTERBOX = "centre crop", "letterbox"
_CHUNK = 8
"""Pictures that are scored at once, or fewer where memory is short."""


class LoadedReward:
    """What travels on a MASKUNET_REWARD link: the reward, and the patchers by which the host manages its memory.

    Before pictures are scored: `comfy.model_management.load_models_gpu(loaded.patchers())`.
    """

    def __init__(self, reward: Reward, patchers: list[comfy.model_patcher.ModelPatcher] | None = None):
        self.reward = reward
        self._patchers = patchers if patchers is not None else [whole_patcher(module) for module in reward.modules()]

    def patchers(self) -> list[comfy.model_patcher.ModelPatcher]:
        return list(self._patchers)


class MaskUNetRewardLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetRewardLoader",
            display_name="MaskUNet Reward Loader",
            category="MaskUNet/search",
            description="Loads a reward: a model that tells how well a picture shows a prompt, or how good it looks. "
            "ImageReward, HPSv2 and HPSv2.1, PickScore, CLIP-H and LAION's aesthetic predictor are read from their "
            "published files in models/reward, whatever the files are called. The toy reward comes with the extension "
            "and reads the pictures of MaskUNet Toy Model.",
            search_aliases=[
                "reward model",
                "image reward",
                "hps",
                "pickscore",
                "aesthetic",
                "clip score",
            ],
            inputs=[
                io.Combo.Input(
                    "reward_name",
                    options=[TOY_REWARD, *folder_paths.get_filename_list(REWARD)],
                    tooltip="Weight file in models/reward, or the bundled toy reward. The aesthetic predictor also "
                    "needs OpenAI's CLIP ViT-L/14 in models/clip_vision or models/reward.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=["auto", *DTYPES],
                    default="auto",
                    tooltip="Precision of the work on pictures. auto: fp16 where the device is fast at it, else fp32. "
                    "Half precision halves the memory; gradients stay right, because the loss is scaled.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=False,
                    tooltip="For optimising on the reward: keeps less memory between forward and backward pass, and "
                    "computes a third more. Scores do not change.",
                ),
            ],
            outputs=[RewardType.Output("MASKUNET_REWARD", tooltip="The reward, to score or to optimise with.")],
        )

    @classmethod
    def validate_inputs(cls, reward_name: str | None) -> bool | str:
        """Replaces the host's own check of the list, which would not say where the file is to be had."""
        if reward_name in (None, TOY_REWARD) or folder_paths.get_full_path(REWARD, reward_name):
            return True
        from ..maskunet_core.rewards.files import KNOWN

        return f"'{reward_name}' is not in models/reward. These files can be put there: {KNOWN}."

    @classmethod
    def fingerprint_inputs(cls, reward_name: str, **options) -> list[list[int]]:
        if reward_name == TOY_REWARD:
            return []
        from ..maskunet_core.rewards.files import files_of, others_in_host

        path = Path(folder_paths.get_full_path_or_raise(REWARD, reward_name))
        return fingerprint(*files_of(path, others_in_host(path)))

    @classmethod
    def execute(cls, reward_name: str, dtype: str, checkpointing: bool) -> io.NodeOutput:
        with torch.inference_mode(False):
            # The architectures are imported where one is wanted: ComfyUI's start does not wait for them.
            from ..maskunet_core.rewards.files import load, others_in_host
            from ..maskunet_core.rewards.toy import ToyReward

            if reward_name == TOY_REWARD:
                return io.NodeOutput(LoadedReward(ToyReward()))
            path = Path(folder_paths.get_full_path_or_raise(REWARD, reward_name))
            return io.NodeOutput(LoadedReward(load(path, others_in_host(path), _dtype(dtype), checkpointing)))


def _dtype(name: str) -> torch.dtype:
    if name in DTYPES:
        return DTYPES[name]
    device = comfy.model_management.get_torch_device()
    return torch.float16 if comfy.model_management.should_use_fp16(device) else torch.float32


def _weight(name: str) -> io.Input:
    return io.Float.Input(
        name,
        default=1.0,
        min=-1000.0,
        max=1000.0,
        step=0.01,
        tooltip="By what this reward's score is multiplied. Rewards have scales of their own: HPSv2's scores differ by "
        "hundredths where ImageReward's differ by whole units. A negative weight turns a reward round.",
    )


class MaskUNetRewardCombine(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetRewardCombine",
            display_name="MaskUNet Reward Combine",
            category="MaskUNet/search",
            description="Adds two rewards, each with its weight. More than two: combine what was combined. They run "
            "one after the other, so that only one of them at a time takes memory for its gradients.",
            search_aliases=["add rewards", "weighted reward", "mix rewards"],
            inputs=[
                RewardType.Input("reward_a", tooltip="The first reward, from MaskUNet Reward Loader or Combine."),
                _weight("weight_a"),
                RewardType.Input("reward_b", tooltip="The second reward, from MaskUNet Reward Loader or Combine."),
                _weight("weight_b"),
            ],
            outputs=[RewardType.Output("MASKUNET_REWARD", tooltip="weight_a x reward_a + weight_b x reward_b.")],
        )

    @classmethod
    def execute(cls, reward_a: LoadedReward, weight_a: float, reward_b: LoadedReward, weight_b: float) -> io.NodeOutput:
        reward = CombinedReward([(weight_a, reward_a.reward), (weight_b, reward_b.reward)])
        patchers = list(dict.fromkeys(reward_a.patchers() + reward_b.patchers()))
        return io.NodeOutput(LoadedReward(reward, patchers))


class MaskUNetRewardScore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetRewardScore",
            display_name="MaskUNet Reward Score",
            category="MaskUNet/search",
            description="Scores pictures against a prompt, and writes the scores under them. Higher is better; scores "
            "of different rewards have different scales.",
            search_aliases=[
                "rate images",
                "image score",
                "compare images",
                "evaluate",
                "caption with score",
            ],
            inputs=[
                io.Image.Input("images", tooltip="The pictures, one or a batch."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    tooltip="What the pictures should show. ImageReward reads its first 33 tokens, about 25 words; "
                    "CLIP, HPSv2 and PickScore the first 75; the aesthetic predictor none.",
                ),
                RewardType.Input("reward", tooltip="From MaskUNet Reward Loader or Combine."),
                io.Combo.Input(
                    "framing",
                    options=[CROP, LETTERBOX],
                    default=CROP,
                    tooltip="How pictures that are not square become so: centre crop is what rewards are optimised "
                    "with; letterbox adds black bars, as for HPSv2's published scores.",
                ),
            ],
            outputs=[
                io.Float.Output("scores", is_output_list=True, tooltip="One score per picture."),
                io.Image.Output("IMAGE", tooltip="Each picture with its scores written under it."),
                io.String.Output(
                    "table", tooltip="All scores as JSON: prompt, reward, scores, and the parts of a combined reward."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images: Tensor, prompt: str, reward: LoadedReward, framing: str) -> io.NodeOutput:
        images = coloured(images, "images")
        with torch.inference_mode(False), torch.no_grad():
            bound, parts = scored(reward, images, prompt, framing)
        scores = total(parts).tolist()
        lines = [[f"{name}  {values[n]:.4g}" for _, name, values in parts] for n in range(len(scores))]
        table = {"prompt": prompt, "reward": bound.name, "scores": for_json(scores)}
        if len(parts) > 1:
            lines = [[*line, f"sum  {score:.4g}"] for line, score in zip(lines, scores)]
            table["parts"] = [
                {"name": name, "weight": weight, "scores": for_json(values.tolist())} for weight, name, values in parts
            ]
        text = json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False)
        unread = words_in_a_line(bound)
        if unread:
            tell(unread, cls.hidden.unique_id)
        return io.NodeOutput(scores, captioned(images, lines), text)


Part = tuple[float, str, Tensor]
"""Weight, name and scores `[B]` of a member of a combined reward."""


def scored(reward: LoadedReward, images: Tensor, prompt: str, framing: str) -> tuple[BoundReward, list[Part]]:
    """Of pictures `[B, H, W, 3]`, and what read the prompt."""
    pictures = images.movedim(-1, 1).to("cpu", torch.float32, copy=True)
    bound = reward.reward.bind(prompt)
    comfy.model_management.load_models_gpu(reward.patchers(), memory_required=_memory_of(pictures[:_CHUNK]))
    return bound, [(weight, part.name, _scores(part, pictures, framing)) for weight, part in bound.parts()]


def total(parts: list[Part]) -> Tensor:
    """`[B]`. A weight of zero leaves a reward out of the sum, also one whose score is no number."""
    used = [weight * values for weight, _, values in parts if weight]
    return sum(used, torch.zeros(len(parts[0][2]), dtype=torch.float64))


def for_json(scores: list[float]) -> list[float | None]:
    """JSON knows neither NaN nor infinity: null."""
    return [score if math.isfinite(score) else None for score in scores]


def _memory_of(pictures: Tensor) -> int:
    """Bytes on the device to score these pictures: each as it is, resized in one direction and in both, and layers."""
    _, channels, height, width = pictures.shape
    resized = channels * max(height, width) * 224 + channels * 224 * 224
    return len(pictures) * (4 * (channels * height * width + resized) + WORK)


def _scores(part: BoundModel, pictures: Tensor, framing: str) -> Tensor:
    """`[B]`, in double precision on the CPU, so that weighted sums of them are exact to the last digit shown."""
    scores, size = [], _CHUNK
    while pictures.shape[0]:
        comfy.model_management.throw_exception_if_processing_interrupted()
        chunk = pictures[:size]
        try:
            scores.append(part(letterbox(chunk, part.size) if framing == LETTERBOX else chunk).double())
        except Exception as error:
            if len(chunk) == 1 or not _is_out_of_memory(error):
                raise
            # Tried again outside of this block, where nothing holds the tensors of the attempt any more.
            size = len(chunk) // 2
        else:
            pictures = pictures[size:]
            continue
        logging.info(
            f"MaskUNet Reward Score: not enough memory for {len(chunk)} pictures at once, going on with {size}."
        )
        comfy.model_management.soft_empty_cache()
    return torch.cat(scores)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # MPS and the CPU say so in words alone.
    return isinstance(error, RuntimeError) and re.search(r"out of memory|not enough memory", str(error)) is not None
