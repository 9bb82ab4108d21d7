"""Scores of pictures by the configured rewards, each picture for its own prompt."""

import torch
from torch import Tensor

from maskunet_core.rewards.reward import WORK, CombinedReward, Reward
from maskunet_core.training.base import fitting

from ..choices import TOY
from ..host import REWARD, model_file

_AT_ONCE = 8
"""Pictures that a reward looks at together."""


class Scorer:
    """models: rewards by their names (see `config.Reward`), with weights. device: where they compute."""

    def __init__(self, models: dict[str, float], device: torch.device):
        self.reward = CombinedReward([(weight, _loaded(name, device)) for name, weight in models.items()])
        self.device = device

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """`[N]` of pictures `[N, 3, H, W]` in [0, 1], on the CPU. The rewards lie on the device in the meantime."""
        import comfy.model_management as management

        modules = self.reward.modules()
        size = sum(management.module_size(module) for module in modules)
        management.free_memory(size + _AT_ONCE * WORK, self.device)
        scores = torch.zeros(len(pictures))
        try:
            with fitting("The reward", self.device, "take a smaller one in reward.models"):
                for module in modules:
                    module.to(self.device)
                for prompt in dict.fromkeys(prompts):
                    bound = self.reward.bind(prompt)
                    rows = torch.tensor([n for n, other in enumerate(prompts) if other == prompt])
                    for some in rows.split(_AT_ONCE):
                        scores[some] = bound(pictures[some].to(self.device)).float().cpu()
        finally:
            for module in modules:
                module.cpu()
        return scores


def _loaded(name: str, device: torch.device) -> Reward:
    if name == TOY:
        from .toy import ToyJudgement

        return ToyJudgement()
    import comfy.model_management as management

    from maskunet_core.rewards.files import load, others_in_host

    path = model_file(REWARD, name)
    return load(path, others_in_host(path), torch.float16 if management.should_use_fp16(device) else torch.float32)
