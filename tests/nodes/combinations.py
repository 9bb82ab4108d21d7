"""The host's nodes around a search on the toy model: what a chain of them makes of a graph, and what has to hold."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.hooks
import comfy.model_management
import comfy.sample
import comfy.sampler_helpers
import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP
from safetensors.torch import save_file
from torch import Tensor

from maskunet_core.files import checkpoint
from tests.builders import make_generator
from tests.host.extension import core_module
from tests.host.nodes import fill, host_nodes, kind_of, run_node, takes
from tests.nodes.probes import PROBES
from tests.nodes.reward_graphs import PROMPT
from tests.tiny_models import controlnet, gligen, lora

SAMPLING = {"seed": 3, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
SEARCH = {"preset": "custom", "iterations": 1, "start_percent": 0.0, "optimiser": "AdamW", "lr": 2.0, "candidates": 1}
BRANCHES = ("both", "positive")
LIVELY = {
    "APG": {"momentum": -0.5},
    "ConditioningSetArea": {"width": 32, "x": 32},
    "ConditioningSetAreaPercentage": {"width": 0.5},
    "ConditioningSetTimestepRange": {"start": 0.5},
    "ContextWindowsManual": {"context_length": 8, "context_overlap": 4, "dim": 2},
    "EasyCache": {"reuse_threshold": 3.0, "start_percent": 0.0},
    "Epsilon Scaling": {"scaling_factor": 1.05},
    "HyperTile": {"tile_size": 32},
    "LazyCache": {"reuse_threshold": 3.0, "start_percent": 0.0},
    "ModelComputeDtype": {"dtype": "bf16"},
    "CFGOverride": {"cfg": 2.0},
    "ConditioningAverage": {"conditioning_to_strength": 0.6},
    "ConditioningMultiply": {"multiplier": 1.2},
    "CreateHookKeyframe": {"strength_mult": 0.5, "start_percent": 0.5},
    "CreateHookKeyframesInterpolated": {"strength_start": 0.2},
    "ModelMergeBlocks": {"input": 0.5, "middle": 0.5, "out": 0.5},
    "ModelMergeSimple": {"ratio": 0.5},
    "ModelNoiseScale": {"noise_scale": 0.9},
    "ModelSamplingDiscrete": {"sampling": "lcm", "zsnr": True},
    "PatchModelAddDownscale": {"block_number": 1, "end_percent": 1.0},
    "RescaleCFG": {"multiplier": 0.7},
    "UNetCrossAttentionMultiply": {"q": 1.2, "k": 0.9, "v": 1.1, "out": 0.9},
    "UNetSelfAttentionMultiply": {"q": 1.2, "k": 0.9, "v": 1.1, "out": 0.9},
}
"""Inputs with which nodes do something to a toy: by their defaults these do nothing, or nothing at its size."""
FREE_U = ("FreeU", "FreeU_V2")


class Stop(Exception):
    """Leaves a run of a sampler once what is wanted of it is known."""


@dataclass(frozen=True)
class Graph:
    """What the nodes of a chain have made so far, by type."""

    model: Any
    positive: Any
    negative: Any
    latent: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)


class World:
    """Toy model, texts and a reward, and what chains of the host's nodes need beside them.

    executed: made as the executor makes them, in inference mode; otherwise with gradients in mind. untouched: the
    model's weights. acting: nodes that are known to change what a stock KSampler draws. before: what it
    draws without any, by batch and width.
    """

    def __init__(self, extension: Callable[[str], Any], executed: bool = True):
        self.extension, self.executed = extension, executed
        with self.mode():
            self.model, self.clip, self.vae = extension("toy").MaskUNetToyModel.execute().result
            encode = lambda text: self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))  # noqa: E731
            self.texts = {"positive": encode(PROMPT), "negative": encode(""), "other": encode("a green star")}
            rewards = extension("rewards")
            self.reward = rewards.MaskUNetRewardLoader.execute(rewards.TOY_REWARD, "auto", False).result[0]
            structure = core_module("seam.attach").structure_of(self.model, "decoder attention")
            self.lora = lora(self.model)
            stream = torch.Generator().manual_seed(8)
            self.other_model = comfy.sd.load_lora_for_models(self.model, None, self.lora, 1.0, 0.0)[0]
            self.values = {
                "CLIP": self.clip,
                "VAE": self.vae,
                "IMAGE": torch.rand(1, 64, 64, 3, generator=stream),
                "MASK": (torch.rand(1, 64, 64, generator=stream) > 0.5).float(),
                "CONTROL_NET": controlnet(self.model, torch.device("cpu")),
                "GLIGEN": gligen(self.model),
                "HOOKS": comfy.hooks.create_hook_lora(lora=self.lora, strength_model=1.0, strength_clip=0.0),
                "LORA_MODEL": self.lora,
                "TIMESTEPS_RANGE": (0.0, 0.6),
            }
        self.structure = structure
        self.untouched, self.acting, self.before = self.weights(), [], {}
        self.sampler = extension("reward_sampler").MaskUNetRewardSampler.PREPARE_CLASS_CLONE({"hidden_inputs": {}})

    def mode(self) -> contextlib.AbstractContextManager:
        if self.executed:
            return torch.inference_mode()
        stack = contextlib.ExitStack()
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        return stack

    # Chains -----------------------------------------------------------------------------------------------------

    def write_files(self, folder: Path) -> None:
        """What nodes find in the host's lists of files, and a generator."""
        import folder_paths

        (folder / "loras").mkdir()
        save_file(self.lora, folder / "loras" / "toy.safetensors")
        folder_paths.add_model_folder_path("loras", str(folder / "loras"), is_default=True)
        file = folder / "lively.safetensors"
        lively = make_generator(self.structure, lively=True)
        checkpoint.save(file, lively, "decoder attention", {})
        self.generator = self.extension("loaded_generator").LoadedGenerator(core_module("files.checkpoint").load(file))

    def graph(self, chain: Sequence[str] = (), batch: int = 1, width: int = 8) -> Graph:
        """The chain's nodes one after the other, each on what those before it made. Whatever they raise passes on."""
        latent = {"samples": torch.zeros(batch, 4, 8, width)}
        graph = Graph(self.model, self.texts["positive"], self.texts["negative"], latent)
        for name in chain:
            graph = self._after(graph, name)
        return graph

    def _after(self, graph: Graph, name: str) -> Graph:
        with self.mode():
            if name in PROBES:
                return PROBES[name](self, graph)
            node = host_nodes()[name]
            config = graph.model.model.model_config.unet_config
            # FreeU looks for feature maps of 2 and 4 times the model's channels, which the toy does not have.
            acting = mock.patch.dict(config, model_channels=config["model_channels"] // 2)
            with acting if name in FREE_U else contextlib.nullcontext():
                inputs = fill(node, partial(self._value, graph, takes(node, "MODEL")), LIVELY.get(name, {}))
                outputs = run_node(node, inputs)
        conditionings = iter(("positive", "negative"))
        for kind, value in zip(map(kind_of, node.RETURN_TYPES), outputs):
            if kind == "MODEL":
                graph = replace(graph, model=value)
            elif kind == "LATENT":
                graph = replace(graph, latent=value)
            elif kind == "CONDITIONING":
                place = next(conditionings, None)
                graph = replace(graph, **{place: value}) if place else graph
            else:
                graph = replace(graph, more=graph.more | {kind: value})
        return graph

    def _value(self, graph: Graph, of_model: bool, name: str, kind: str, required: bool) -> Any:
        """For an input of a node; None where its schema knows better, or there is nothing."""
        if kind == "CONDITIONING":
            if name.startswith("negative"):
                return graph.negative
            if name.endswith(("_NEW", "_DEFAULT", "_B", "_2", "_from", "cond2")):
                return self.texts["other"]
            return self.texts["negative"] if name.startswith("empty") else graph.positive
        if kind == "MODEL":
            return self.other_model if name == "model2" else graph.model
        if kind == "INT":
            # Nodes for video ask for more than a test has time for.
            return None if of_model else {"width": 64, "height": 64, "length": 1}.get(name)
        known = self.values | {"LATENT": graph.latent} | graph.more
        if kind in known or not required or kind in ("FLOAT", "BOOLEAN", "STRING", "COMBO"):
            return known.get(kind)
        return self._made(graph, kind)

    def _made(self, graph: Graph, kind: str) -> Any:
        """By the first of the host's nodes that makes such a thing out of what is known."""
        for node in host_nodes().values():
            if [kind_of(made) for made in node.RETURN_TYPES] == [kind]:
                with contextlib.suppress(Exception):
                    inputs = fill(node, lambda name, of, _: self._value(graph, False, name, of, False), {})
                    return run_node(node, inputs)[0]
        return None

    # Runs -------------------------------------------------------------------------------------------------------

    def stock(self, graph: Graph, model: Any = None) -> tuple[Tensor, Tensor]:
        """(latents, estimate of the first step) of KSampler. The estimate is the guider's, before a mask for inpainting
        puts back what is kept."""
        seen = []

        def predict(executor: Any, *arguments: Any) -> Tensor:
            estimate = executor(*arguments)
            seen.append(estimate.clone())
            return estimate

        looking = (model or graph.model).clone()
        looking.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "stock", predict)
        with self.mode():
            return self.sampled(graph, looking), seen[0]

    def sampled(self, graph: Graph, model: Any, **changes: Any) -> Tensor:
        options = SAMPLING | changes
        settings = [options.pop(name) for name in ("steps", "cfg", "sampler_name", "scheduler")]
        samples = comfy.sample.fix_empty_latent_channels(model, graph.latent["samples"])
        noise = comfy.sample.prepare_noise(samples, options["seed"]) * options.pop("louder", 1.0)
        conditionings = (graph.positive, graph.negative)
        options |= {"noise_mask": graph.latent.get("noise_mask"), "disable_pbar": True}
        return comfy.sample.sample(model, noise, *settings, *conditionings, samples, **options)

    def search(self, graph: Graph, branches: str, recompute: bool | None = None, **changes: Any) -> "Found":
        """What MaskUNet Reward Sampler does."""
        found, module = Found(), core_module("search.run")
        group = core_module("search.loop").Group
        step = group.step

        def keep_slopes(optimised: Any, slopes: list[Any], factors: list[Tensor], images: list[bool]) -> None:
            if not found.slopes:
                whole = [replace(slope, values=slope.values.clone()).times(factors, torch.float32) for slope in slopes]
                found.slopes = dict(zip(self.structure.layers, whole))
            step(optimised, slopes, factors, images)

        def keep_estimate(_: Any, seen: Any, estimate: Tensor) -> None:
            if found.estimate is None:
                found.estimate = estimate.clone()

        progress = self.extension("search_progress").SearchProgress
        inputs = {"vae": self.vae, "reward": self.reward, "prompt": PROMPT, "masks": True, "branches": branches}
        inputs |= {"model": graph.model, "positive": graph.positive, "negative": graph.negative}
        with (
            mock.patch.object(group, "step", keep_slopes),
            mock.patch.object(progress, "look", keep_estimate),
            mock.patch.object(module, "RewardSearch", partial(module.RewardSearch, recompute=recompute)),
            self.mode(),
        ):
            settings = SAMPLING | SEARCH | changes
            result = self.sampler.execute(**inputs, latent_image=graph.latent, **settings).result
            found.latents, found.masks = result[0]["samples"], result[1]
        return found

    def replay(self, graph: Graph, masks: Any, **changes: Any) -> Tensor:
        """What a stock KSampler draws with MaskUNet Apply Masks behind the chain's nodes."""
        with self.mode():
            model = self.extension("masks").MaskUNetApplyMasks.execute(graph.model, masks, 1.0).result[0]
            return self.sampled(graph, model, **changes)

    def direct_slopes(self, graph: Graph, branches: str, louder: float = 1.0) -> dict[str, Tensor]:
        """Gradients of the first step's estimate that has any, by plain autograd, everything in one graph.

        louder: times the starting noise.
        """
        attach, gradients = core_module("seam.attach"), core_module("seam.gradients")
        masks_of, settings = core_module("search.masks").SearchedMasks, core_module("search.settings").SearchSettings
        decode = core_module("search.decoder").latent_decoder(self.vae, graph.model.get_model_object("latent_format"))
        bound = self.reward.reward.bind(PROMPT)
        model, slopes = attach.with_masks(graph.model), {}
        masks = masks_of(
            self.structure, len(graph.latent["samples"]), settings.start, torch.device("cpu"), None, branches != "both"
        )

        def finished(estimate: Tensor) -> Tensor:
            """Outside of a mask for inpainting pictures end as they were."""
            if "noise_mask" not in graph.latent:
                return estimate
            samples = comfy.sample.fix_empty_latent_channels(model, graph.latent["samples"])
            kept = graph.model.model.process_latent_in(samples)
            mask = comfy.sampler_helpers.prepare_mask(graph.latent["noise_mask"], estimate.shape, estimate.device)
            return estimate * mask + kept * (1 - mask)

        def predict(executor, x, timestep, model_options, seed):
            options = attach.with_attachment(model_options, attach.Attachment(masks))
            layers = [executor.class_obj.inner_model.diffusion_model]
            with (
                torch.enable_grad(),
                gradients.kept_weights(layers),
                torch.autograd.graph.allow_mutation_on_saved_tensors(),
            ):
                estimate = executor(x, timestep, options, seed)
                if not estimate.requires_grad:
                    return estimate
                (-bound(decode(finished(estimate))).sum()).backward()
            slopes.update({name: logits.grad for name, logits in masks.logits.items() if logits.grad is not None})
            raise Stop

        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "direct", predict)
        with contextlib.suppress(Stop), self.mode():
            self.sampled(graph, model, louder=louder)
        return slopes

    # With a generator -------------------------------------------------------------------------------------------

    def generated(
        self, chain: Sequence[str], batch: int = 1, width: int = 8, guider: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """(what MaskUNet Apply draws behind the chain's nodes, the replay of its masks)"""
        node = self.extension
        sampled = partial(self.guided, guider=guider) if guider else lambda graph: self.stock(graph)[0]
        graph = self.graph(chain, batch, width)
        with self.mode():
            masked = node("generator").MaskUNetApply.execute(graph.model, self.generator, 1.0, 0.0, 1.0, False, 0)
            recording = node("record_masks").MaskUNetRecordMasks.execute(masked.result[0]).result[0]
        samples = sampled(replace(graph, model=recording))
        graph = self.graph(chain, batch, width)
        with self.mode():
            masks = node("record_masks").MaskUNetMasksOfRun.execute({"samples": samples}).result[0]
            replaying = node("masks").MaskUNetApplyMasks.execute(graph.model, masks, 1.0).result[0]
        return samples, sampled(replace(graph, model=replaying))

    def guided(self, graph: Graph, guider: str) -> Tensor:
        """SamplerCustomAdvanced with one of the host's guiders."""
        nodes = host_nodes()
        with self.mode():
            inputs = fill(nodes[guider], partial(self._value, graph, True), {})
            (made,) = run_node(nodes[guider], inputs)
            (noise,) = run_node(nodes["RandomNoise"], {"noise_seed": 3})
            (sampler,) = run_node(nodes["KSamplerSelect"], {"sampler_name": "euler"})
            settings = {"model": graph.model, "scheduler": "normal", "steps": 2, "denoise": 1.0}
            (sigmas,) = run_node(nodes["BasicScheduler"], settings)
            custom = {"noise": noise, "guider": made, "sampler": sampler, "sigmas": sigmas}
            custom["latent_image"] = graph.latent
            return run_node(nodes["SamplerCustomAdvanced"], custom)[0]["samples"]

    def weights(self) -> list[Tensor]:
        """Of the model that lies at rest."""
        with torch.inference_mode():
            comfy.model_management.unload_all_models()
            return [value.clone() for value in self.model.model.state_dict().values()]


@dataclass
class Found:
    """Of a search: estimate: its first look's; slopes: by layer, of its first update."""

    estimate: Tensor | None = None
    slopes: dict[str, Tensor] = field(default_factory=dict)
    latents: Tensor | None = None
    masks: Any = None
