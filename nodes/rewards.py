"""Load rewards, combine them, and score pictures with them."""

import comfy.model_management
import comfy.model_patcher
import torch
from comfy_api.latest import io

from ..maskunet_core.rewards.reward import CombinedReward, Reward
from ..maskunet_core.rewards.toy import ToyReward
from .types import RewardType

TOY_REWARD = "toy reward (bundled)"


class _WholePatcher(comfy.model_patcher.ModelPatcher):
    """Moves its module as a whole, because plain torch layers cannot run from two devices; and outside of inference
    mode, because weights that move inside it can no longer take part in a backward pass."""

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        with torch.inference_mode(False):
            super().load(device_to, force_patch_weights=force_patch_weights, full_load=True)

    def partially_unload(self, *arguments, **options) -> int:
        return 0


class LoadedReward:
    """What travels on a MASKUNET_REWARD link: the reward, and the patchers by which the host manages its memory.

    Before pictures are scored: `comfy.model_management.load_models_gpu(loaded.patchers())`.
    """

    def __init__(self, reward: Reward, patchers: list[comfy.model_patcher.ModelPatcher] | None = None):
        self.reward = reward
        self._patchers = patchers if patchers is not None else [_patcher(module) for module in reward.modules()]

    def patchers(self) -> list[comfy.model_patcher.ModelPatcher]:
        return list(self._patchers)


def _patcher(module: torch.nn.Module) -> _WholePatcher:
    management = comfy.model_management
    return _WholePatcher(module, management.get_torch_device(), management.unet_offload_device())


class MaskUNetRewardLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetRewardLoader",
            display_name="MaskUNet Reward Loader",
            category="MaskUNet",
            description="Loads a reward: a model that tells how well a picture shows a prompt. The toy reward comes "
            "with the extension and reads the pictures of MaskUNet Toy Model.",
            search_aliases=["reward model", "image reward", "hps", "pickscore", "aesthetic", "clip score"],
            inputs=[
                io.Combo.Input(
                    "reward_name",
                    options=[TOY_REWARD],
                    tooltip="The bundled toy reward.",
                ),
            ],
            outputs=[RewardType.Output("MASKUNET_REWARD", tooltip="The reward, to score or to optimise with.")],
        )

    @classmethod
    def execute(cls, reward_name: str) -> io.NodeOutput:
        with torch.inference_mode(False):
            return io.NodeOutput(LoadedReward(ToyReward()))


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
            category="MaskUNet",
            description="Adds two rewards, each with its weight. More than two: combine what was combined. They run "
            "one after the other, so the memory that is needed is that of the larger one.",
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
