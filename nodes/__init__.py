"""The extension as ComfyUI sees it: its model folders and its nodes."""

from comfy_api.latest import ComfyExtension, io

from . import folders
from .attention import MaskUNetAttentionGuidance, MaskUNetAttentionMaps, MaskUNetPromptWords
from .compare_batches import MaskUNetCompareBatches
from .generator import MaskUNetApply, MaskUNetLoader
from .inspect_masks import MaskUNetInspect
from .judges import MaskUNetCheckPicture, MaskUNetJudgeLoader
from .masks import MaskUNetApplyMasks, MaskUNetLoadMasks, MaskUNetSaveMasks
from .random_mask import MaskUNetRandomMask
from .record_masks import MaskUNetMasksOfRun, MaskUNetRecordMasks
from .reward_sampler import MaskUNetRewardSampler, MaskUNetRewardSamplerCustom
from .rewards import MaskUNetRewardCombine, MaskUNetRewardLoader, MaskUNetRewardScore
from .toy import MaskUNetToyModel
from .train import MaskUNetTrain
from .video import MaskUNetCrossFrame, MaskUNetVideoSampler


class MaskUNetExtension(ComfyExtension):
    async def on_load(self) -> None:
        folders.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            MaskUNetLoader,
            MaskUNetApply,
            MaskUNetTrain,
            MaskUNetRandomMask,
            MaskUNetRewardSampler,
            MaskUNetRewardSamplerCustom,
            MaskUNetRewardLoader,
            MaskUNetRewardCombine,
            MaskUNetRewardScore,
            MaskUNetJudgeLoader,
            MaskUNetCheckPicture,
            MaskUNetCompareBatches,
            MaskUNetApplyMasks,
            MaskUNetSaveMasks,
            MaskUNetLoadMasks,
            MaskUNetRecordMasks,
            MaskUNetMasksOfRun,
            MaskUNetInspect,
            MaskUNetPromptWords,
            MaskUNetAttentionGuidance,
            MaskUNetAttentionMaps,
            MaskUNetCrossFrame,
            MaskUNetVideoSampler,
            MaskUNetToyModel,
        ]


async def comfy_entrypoint() -> MaskUNetExtension:
    return MaskUNetExtension()
