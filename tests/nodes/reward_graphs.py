"""Graphs around the reward sampler in API format, and what a real server makes of them."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from tests.host.server import Server

PROMPT = "a red star left of a blue circle"
SAMPLING = {"seed": 3, "steps": 4, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
NO_UPDATES = {"preset": "custom", "iterations": 0, "candidates": 1}
FEW_UPDATES = {"preset": "custom", "iterations": 3, "start_percent": 0.25, "lr": 0.1, "candidates": 1}


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": class_type}}


class Graph(dict):
    """Toy model, prompts, an empty latent and the toy reward; samplers and more are added by methods."""

    def __init__(self, batch: int = 1, side: int = 64):
        super().__init__()
        self["toy"] = node("MaskUNetToyModel")
        self["positive"] = node("CLIPTextEncode", clip=["toy", 1], text=PROMPT)
        # Digits mean nothing to the toy's text encoder, but make the server sample again.
        self["negative"] = node("CLIPTextEncode", clip=["toy", 1], text=str(time.monotonic_ns()))
        self["empty"] = node("EmptyLatentImage", width=side, height=side, batch_size=batch)
        self["reward"] = node(
            "MaskUNetRewardLoader", reward_name="toy reward (bundled)", dtype="auto", checkpointing=False
        )
        self._sampled = {"model": ["toy", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
        self._sampled["latent_image"] = ["empty", 0]

    def plain(self, name: str, **changes: Any) -> str:
        """A stock KSampler whose latent is saved under `name`."""
        self[name] = node("KSampler", **self._sampled | SAMPLING | changes)
        return self.saved(name)

    def rewarded(self, name: str, **changes: Any) -> str:
        """The reward sampler, the same otherwise; with few updates unless told."""
        inputs = {"vae": ["toy", 2], "reward": ["reward", 0], "prompt": PROMPT, "masks": True, "candidates": 1}
        self[name] = node("MaskUNetRewardSampler", **self._sampled | SAMPLING | inputs | (changes or FEW_UPDATES))
        return self.saved(name)

    def saved(self, name: str) -> str:
        self[f"save {name}"] = node("SaveLatent", samples=[name, 0], filename_prefix="latents/sampled")
        return name

    def scored(self, name: str) -> str:
        """The rewards of a sampler's decoded images, as text."""
        self[f"decode {name}"] = node("VAEDecode", samples=[name, 0], vae=["toy", 2])
        images = [f"decode {name}", 0]
        self[f"rate {name}"] = node(
            "MaskUNetRewardScore", images=images, prompt=PROMPT, reward=["reward", 0], framing="centre crop"
        )
        self[f"score {name}"] = node("PreviewAny", source=[f"rate {name}", 2])
        return name


class Result:
    """What a server made of a graph."""

    def __init__(self, server: Server, graph: dict, on_event=None):
        self.base, self.outputs = server.base, server.run(graph, on_event)

    def latents(self, name: str) -> torch.Tensor:
        (saved,) = self.outputs[f"save {name}"]["latents"]
        return load_file(self.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]

    def scores(self, name: str) -> list[float]:
        return json.loads(self.outputs[f"score {name}"]["text"][0])["scores"]
