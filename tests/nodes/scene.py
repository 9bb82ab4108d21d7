"""Models, conditioning and a reward in this process, as the host's executor makes them, and nodes that use them."""

import comfy.model_management
import comfy.sample
import comfy.sd
import torch

from tests.host.extension import core_module
from tests.host.memory import run_as_executor
from tests.nodes.reward_graphs import PROMPT, SAMPLING
from tests.tiny_models import CONTEXT, controlnet, kl_vae, lora, taesd_vae

SAMPLED = SAMPLING | {"steps": 3}
SEARCH = {"preset": "custom", "iterations": 2, "start_percent": 0.4, "lr": 0.1, "candidates": 2}
SEARCH |= {"candidate_percent": 0.5}
HOSTS_OWN = ("_v", "_pin", "comfy_", "prev_comfy_", "weight_", "bias_", "seed_key")
"""Beginnings of attributes that the host itself sets on layers when it loads a model."""


class Scene:
    """Models, conditioning and a reward as the executor makes them, and the nodes that use them.

    Made where the host's memory already is as a test wants it.
    """

    def __init__(self, extension, kind: str, files=None):
        self.extension = extension
        self.sampler = extension("reward_sampler").MaskUNetRewardSampler.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        with torch.inference_mode():
            self.model, clip, vae = extension("toy").MaskUNetToyModel.execute().result
            self.texts = {
                name: clip.encode_from_tokens_scheduled(clip.tokenize(text))
                for name, text in [("positive", PROMPT), ("negative", "")]
            }
            rewards = extension("rewards")
            self.reward = rewards.MaskUNetRewardLoader.execute(rewards.TOY_REWARD, "auto", False).result[0]
            self.inputs = {"vae": vae}
            self.modules = [self.model.model]
            getattr(self, f"_{kind}")(files)

    def _toy(self, files):
        pass

    def _kl(self, files):
        self.inputs |= {"vae": kl_vae(), "branches": "positive"}
        self.modules.append(self.inputs["vae"].first_stage_model)

    def _taesd(self, files):
        self.inputs |= {"vae": kl_vae(), "gradient_vae": taesd_vae()}
        self.modules.append(self.inputs["gradient_vae"].first_stage_model)

    def _control(self, files):
        self.inputs |= {"vae": kl_vae()}
        net = controlnet(self.model, comfy.model_management.get_torch_device())
        self.modules.append(net.control_model)
        self.texts = {
            name: [[text, {**more, "control": net, "control_apply_to_uncond": True}] for text, more in conditioning]
            for name, conditioning in self.texts.items()
        }

    def _lora(self, files):
        self.model = comfy.sd.load_lora_for_models(self.model, None, lora(self.model), 1.0, 0.0)[0]

    def _bypass(self, files):
        self.model = comfy.sd.load_bypass_lora_for_models(self.model, None, lora(self.model), 1.0, 0.0)[0]

    def _latent(self, files):
        self.inputs |= {"latent_lr": 0.05}

    def _unet(self, path):
        self.model = comfy.sd.load_diffusion_model(str(path))
        self.inputs |= {"vae": kl_vae(), "branches": "positive"}
        self.modules = [self.model.model]
        stream = torch.Generator().manual_seed(1)
        self.texts = {name: [[torch.randn(1, 7, CONTEXT, generator=stream), {}]] for name in ("positive", "negative")}

    def search(self, batch=1, **changes):
        """(latents, MASKUNET_MASKS, curve, candidates, seeds)"""
        inputs = {"model": self.model, "reward": self.reward, "prompt": PROMPT, "masks": True, **self.texts}
        inputs |= {"latent_image": {"samples": torch.zeros(batch, 4, 8, 8)}, **SAMPLED, **SEARCH}
        return run_as_executor(self.sampler.execute, **inputs | self.inputs | changes).result

    def stock(self, model=None, batch=1):
        """What a stock KSampler draws."""
        return run_as_executor(self._stock, model or self.model, batch)

    def _stock(self, model, batch):
        empty, options = torch.zeros(batch, 4, 8, 8), dict(SAMPLED)
        settings = [options.pop(name) for name in ("steps", "cfg", "sampler_name", "scheduler")]
        start = comfy.sample.prepare_noise(empty, options["seed"])
        texts = (self.texts["positive"], self.texts["negative"])
        return comfy.sample.sample(model, start, *settings, *texts, empty, disable_pbar=True, **options)

    def masked(self, generator_file):
        """(what MaskUNet Apply draws, what the replay of its recorded masks draws)"""
        node = self.extension
        file = core_module("files.checkpoint").load(generator_file)
        loaded = node("loaded_generator").LoadedGenerator(file)
        with torch.inference_mode():
            masked = node("generator").MaskUNetApply.execute(self.model, loaded, 1.0, 0.0, 1.0, False, 0).result[0]
            recording = node("record_masks").MaskUNetRecordMasks.execute(masked).result[0]
            samples = self.stock(recording)
            masks = node("record_masks").MaskUNetMasksOfRun.execute({"samples": samples}).result[0]
            replaying = node("masks").MaskUNetApplyMasks.execute(self.model, masks, 1.0).result[0]
        return samples, self.stock(replaying)

    def state(self):
        """(weights by name, attributes and hooks of each layer) of a model that lies at rest."""
        with torch.inference_mode():
            comfy.model_management.unload_all_models()
        weights, marks = [], []
        for module in self.modules:
            weights.append({name: _bytes(value) for name, value in module.state_dict().items()})
            for name, part in module.named_modules():
                own = sorted(key for key in part.__dict__ if not key.startswith(HOSTS_OWN))
                hooks = len(part._forward_pre_hooks), len(part._forward_hooks)
                functions = [*getattr(part, "weight_function", ()), *getattr(part, "bias_function", ())]
                foreign = [function for function in functions if not getattr(function, "is_lowvram_patch", False)]
                marks.append((name, type(part), own, hooks, foreign, "forward_comfy_cast_weights" in part.__dict__))
        return weights, marks


def _bytes(value):
    if type(value).__name__ == "QuantizedTensor":
        return [_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0]]
    return value.detach().to("cpu", copy=True).contiguous().flatten().view(torch.uint8)


def same_bytes(one, other) -> bool:
    if isinstance(one, list):
        return all(same_bytes(*pair) for pair in zip(one, other, strict=True))
    return torch.equal(one, other)


def same_state(one, other) -> bool:
    weights = all(
        first.keys() == second.keys() and all(same_bytes(first[name], second[name]) for name in first)
        for first, second in zip(one[0], other[0], strict=True)
    )
    return weights and one[1] == other[1]


def require_same(found, plain) -> None:
    """Latents, masks, history (drawn into the curve), scores, candidates and seeds, bit for bit."""
    latents, masks, curve, candidates, seeds = found
    plain_latents, plain_masks, plain_curve, plain_candidates, plain_seeds = plain
    assert torch.isfinite(latents["samples"]).all()
    assert masks.record["scores"] == plain_masks.record["scores"]
    assert masks.steps.keys() == plain_masks.steps.keys()
    for sigma, layers in plain_masks.steps.items():
        assert masks.steps[sigma].keys() == layers.keys()
        assert all(torch.equal(masks.steps[sigma][name], packed) for name, packed in layers.items())
    assert torch.equal(curve, plain_curve)
    assert torch.equal(candidates, plain_candidates)
    assert seeds == plain_seeds
    assert torch.equal(latents["samples"], plain_latents["samples"])
