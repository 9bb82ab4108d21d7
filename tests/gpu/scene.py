"""What a graph in the host holds: models from the stock loaders, and samplers; by the nodes' own inputs."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.gpu import models
from tests.gpu.host import extension
from tests.gpu.models import Size

PROMPT, CFG, SEED = "a red circle left of a blue square", 5.0, 3
SAMPLING = {"seed": SEED, "cfg": CFG, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}


def models_folder(size: Size) -> Path:
    """Where files with random weights lie while `make gpu` runs."""
    return Path(os.environ["MASKUNET_GPU_MODELS"]) / ("full" if size.full else "tiny")


class Scene:
    """model, vae: of a checkpoint with random weights; positive, negative: conditioning. Nodes run as the executor runs
    them, in inference mode."""

    def __init__(self, size: Size):
        self.size = size
        folder = models_folder(size)
        models.write_models(folder, size)
        self.node = extension()
        import folder_paths

        import nodes

        self.host = nodes
        for kind in ("checkpoints", "loras", "controlnet", "maskunet", "reward"):
            folder_paths.add_model_folder_path(kind, str(folder))
        with torch.inference_mode():
            loaded = nodes.CheckpointLoaderSimple().load_checkpoint(models.CHECKPOINT)
            self.model, self.clip, self.vae = loaded
            self.positive, self.negative = (nodes.CLIPTextEncode().encode(self.clip, text)[0] for text in (PROMPT, ""))

    @torch.inference_mode()
    def masked(self, model: Any = None, file: str = models.LIVELY, strength: float = 1.0, **changes: Any) -> Any:
        """By a generator."""
        node = self.node("generator")
        options = {"start_percent": 0.0, "end_percent": 1.0, "stochastic": False, "seed": 0} | changes
        generator = node.MaskUNetLoader.execute(file).result[0]
        return node.MaskUNetApply.execute(model or self.model, generator, strength, **options).result[0]

    @torch.inference_mode()
    def random(self, model: Any = None, keep: float = 0.95) -> Any:
        """By chance, other masks at every step."""
        node = self.node("random_mask").MaskUNetRandomMask
        return node.execute(model or self.model, keep, 1, models.TARGETS, True, 0.0, 1.0).result[0]

    def recording(self, model: Any) -> Any:
        return self.node("record_masks").MaskUNetRecordMasks.execute(model).result[0]

    def masks_of(self, latent: dict) -> Any:
        return self.node("record_masks").MaskUNetMasksOfRun.execute(latent).result[0]

    def replaying(self, masks: Any, model: Any = None) -> Any:
        return self.node("masks").MaskUNetApplyMasks.execute(model or self.model, masks, 1.0).result[0]

    def with_lora(self, model: Any = None) -> Any:
        return self.host.LoraLoaderModelOnly().load_lora_model_only(model or self.model, models.LORA, 1.0)[0]

    @torch.inference_mode()
    def with_control(self) -> tuple[Any, Any]:
        """The conditioning with a ControlNet on both branches."""
        net = self.host.ControlNetLoader().load_controlnet(models.CONTROLNET)[0]
        hint = torch.rand(1, self.size.pixels, self.size.pixels, 3, generator=torch.Generator().manual_seed(4))
        node = self.host.ControlNetApplyAdvanced()
        return node.apply_controlnet(self.positive, self.negative, net, hint, 1.0, 0.0, 1.0)

    def latent(self, images: int, pixels: int) -> dict:
        return self.host.EmptyLatentImage().generate(pixels, pixels, images)[0]

    @torch.inference_mode()
    def draw(self, model: Any, images: int = 1, conditioning: tuple[Any, Any] | None = None, **changes: Any) -> dict:
        """The latent that KSampler gives."""
        positive, negative = conditioning or (self.positive, self.negative)
        latent = self.latent(images, changes.pop("pixels", self.size.pixels))
        options = {"steps": self.size.steps, **SAMPLING, **changes}
        options |= {"positive": positive, "negative": negative, "latent_image": latent}
        return self.host.KSampler().sample(model, **options)[0]

    def samples(self, model: Any, images: int = 1, **options: Any) -> Tensor:
        return self.draw(model, images, **options)["samples"]

    @torch.inference_mode()
    def reward(self) -> Any:
        return self.node("rewards").MaskUNetRewardLoader.execute(models.REWARD, "auto", False).result[0]

    def searcher(self) -> Callable[..., tuple]:
        """MaskUNet Reward Sampler: its outputs, from its inputs that differ from those of `draw`."""
        node = self.node("reward_sampler").MaskUNetRewardSampler.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        reward = self.reward()

        def search(pixels: int, **inputs: Any) -> tuple:
            given = {"model": self.model, "vae": self.vae, "reward": reward, "prompt": PROMPT, "masks": True}
            given |= {"positive": self.positive, "negative": self.negative, "latent_image": self.latent(1, pixels)}
            with torch.inference_mode():
                return node.execute(**given | SAMPLING | inputs).result

        return search
