"""What can be trained on a frozen base: mask generators, and the baselines that they are measured against.

A method owns its parameters, says how they act on the U-Net while training and while sampling, and writes a file.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from maskunet_core.files import checkpoint
from maskunet_core.masks.call import Call
from maskunet_core.masks.generator import LowRankGenerator, LowRankSettings, key_of
from maskunet_core.masks.reference import ReferenceGenerator, authors_maps
from maskunet_core.masks.sources import GeneratorMasks, LearningGenerator
from maskunet_core.models.families.unet import UNET
from maskunet_core.models.structure import Layer, Structure
from maskunet_core.seam.attach import attach, structure_of
from maskunet_core.seam.layers import Linear, masked, modules_of, replaced_linears

from .base import BaseModel, checkpointed, recomputed
from .config import Config
from .files import replacing


class MaskCounts:
    """Keep ratio, and the share of weights whose bit differs inside a batch, per layer of the calls since `reset`."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        # Per layer: [kept, differing] on the mask's device, so that no layer waits for it; [bits, weights].
        self._counted: dict[str, Tensor] = {}
        self._sizes: dict[str, tuple[int, int]] = {}

    def __call__(self, layer: str, mask: Tensor) -> None:
        bits = mask.detach() > 0.5
        counted = torch.stack([bits.sum(), (bits.any(0) & ~bits.all(0)).sum()])
        before, (total, weights) = self._counted.get(layer), self._sizes.get(layer, (0, 0))
        self._counted[layer] = counted if before is None else before + counted
        self._sizes[layer] = total + bits.numel(), weights + bits[0].numel()

    def _totals(self) -> list[int]:
        """[kept, differing] of all layers."""
        return torch.stack(list(self._counted.values())).sum(0).tolist() if self._counted else [0, 0]

    @property
    def keep_ratio(self) -> float:
        return self._totals()[0] / max(1, sum(total for total, _ in self._sizes.values()))

    @property
    def share_differing(self) -> float:
        return self._totals()[1] / max(1, sum(weights for _, weights in self._sizes.values()))

    @property
    def keep_ratio_per_layer(self) -> dict[str, float]:
        if not self._counted:
            return {}
        kept = torch.stack(list(self._counted.values()))[:, 0].tolist()
        return {layer: count / self._sizes[layer][0] for layer, count in zip(self._counted, kept)}


class _Method:
    """What all methods share. base: the frozen model; module: the trained parameters."""

    statistics: MaskCounts | None = None
    module: nn.Module
    destination = ("maskunet", "press R in ComfyUI and choose it in MaskUNet Loader")
    """ComfyUI's folder of models that the file belongs into, and what is to be done with it there."""

    def __init__(self, base: BaseModel, config: Config):
        self.base, self.config = base, config
        self.structure = structure_of(base.patcher, config.targets)
        self.modules = modules_of(base.unet)

    @contextlib.contextmanager
    def _passes(self, training: bool, learned: Callable[[str], Sequence[Tensor]]) -> Iterator[None]:
        """Around a call of the model and, while training, its backward pass. learned: see `recomputed`."""
        with contextlib.ExitStack() as stack:
            if training:
                stack.enter_context(self.base.differentiable())
            if training and self.config.loop.checkpointing:
                unet = self.base.family is UNET
                stack.enter_context(
                    checkpointed(self.base.unet.output_blocks) if unet else recomputed(self.base, learned)
                )
            yield

    def observe(self, on: bool) -> None:
        """Collect statistics from now on, or stop; nothing to see in most methods."""

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        """The base is as it was before training, for one call of the U-Net: what `acting` is compared with."""
        yield

    @contextlib.contextmanager
    def idle_sampling(self) -> Iterator[Any]:
        """Yields a MODEL as it was before training: what `sampling` is compared with."""
        yield self.base.patcher

    def prompt(self, text: str) -> str:
        """A prompt of the configuration as the host's prompts spell it."""
        return text

    def example(self, count: int) -> dict[str, Tensor]:
        """The conditions of `count` samples of a training step, to measure what a step takes."""
        empty = self.base.encode_text("")
        return {key: value.expand(count, *value.shape) for key, value in empty.items()}

    def files(self, result: Path) -> dict[Path, tuple[str, str]]:
        """What `save` writes for the file of a run, and for each the folder of ComfyUI's models and its use."""
        return {result: self.destination}


def _new_generator(structure: Structure, unet: nn.Module, config: Config) -> LowRankGenerator | ReferenceGenerator:
    settings = config.generator
    if settings.architecture == ReferenceGenerator.architecture:
        generator = ReferenceGenerator(structure, authors_maps(structure, unet))
        generator.start_training(settings.start, settings.freed)
        return generator
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(LowRankSettings)}
    if config.method == "static_mask":
        values["rank"] = 0
    return LowRankGenerator(structure, LowRankSettings(**values))


class MaskMethod(_Method):
    """`maskunet`, and `static_mask`, which is a generator of rank 0. Its file is what MaskUNet Loader reads."""

    def __init__(self, base: BaseModel, config: Config):
        super().__init__(base, config)
        torch.manual_seed(config.seed)
        self.module = _new_generator(self.structure, base.unet, config)
        self.statistics = MaskCounts()
        self.source = LearningGenerator(self.module, config.generator.noise)

    def groups(self) -> list[dict[str, Any]]:
        """The static bias learns faster than the rest: it has to carry logits across the threshold."""
        static = self.module.static_parameters()
        chosen = {id(p) for p in static}
        dynamic = [p for p in self.module.parameters() if id(p) not in chosen]
        settings = self.config.optimiser
        groups = [{"params": static, "lr": settings.lr_bias}, {"params": dynamic, "lr": settings.lr}]
        return [group for group in groups if group["params"]]

    def observe(self, on: bool) -> None:
        self.statistics.reset()
        self.source.observe = self.statistics if on else None

    @contextlib.contextmanager
    def acting(self, training: bool = True) -> Iterator[None]:
        """The method acts on the U-Net, for one call of it and, while training, its backward pass."""
        source = self.source if training else GeneratorMasks(self.module, observe=self.source.observe)
        call = Call()

        def learned(block: str) -> list[Tensor]:
            return [leaf for of_source in call.leaves for leaf in of_source(block)]

        with self._passes(training, learned), masked(self.modules, [(source, 1.0)], call):
            yield

    @contextlib.contextmanager
    def sampling(self) -> Iterator[Any]:
        """Yields a MODEL on which the method acts as the nodes apply it."""
        yield attach(self.base.patcher, GeneratorMasks(self.module), 1.0, 0.0, 1.0)

    def save(self, path: Path, record: dict[str, Any]) -> None:
        checkpoint.save(path, self.module, self.config.targets, record)


class _LayerMethod(_Method):
    """A method that computes linear layers in another way, the same for every step and sample.

    Of a layer that computes several things at once the parts that are trained are layers of the structure.
    """

    destination = ("loras", "press R in ComfyUI and choose it in Load LoRA")

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters()), "lr": self.config.optimiser.lr}]

    def _by_module(self) -> dict[str, list[Layer]]:
        """The layers of the structure by the names of the linear layers that they are, or are parts of."""
        found: dict[str, list[Layer]] = {}
        for layer in self.structure.layers.values():
            found.setdefault(layer.module_name, []).append(layer)
        return found

    def _learned(self, block: str) -> list[Tensor]:
        layers = (layer.name for found in self.structure.blocks if found.name == block for layer in found.layers)
        return [parameter for name in layers for parameter in self._parameters(name)]

    def _parameters(self, layer: str) -> Iterable[Tensor]:
        raise NotImplementedError

    def linear(self, layers: Sequence[Layer]) -> Linear:
        """layers: one linear layer, or parts of it."""
        raise NotImplementedError

    @contextlib.contextmanager
    def acting(self, training: bool = True) -> Iterator[None]:
        linears = {name: self.linear(layers) for name, layers in self._by_module().items()}
        with self._passes(training, self._learned), replaced_linears(self.modules, linears):
            yield

    @contextlib.contextmanager
    def sampling(self) -> Iterator[Any]:
        with self.acting(training=False):
            yield self.base.patcher

    def tensors(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def save(self, path: Path, record: dict[str, Any]) -> None:
        """A file that the stock LoraLoader reads."""
        tensors = {key: value.detach().cpu().half().contiguous() for key, value in self.tensors().items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"training": json.dumps(record)})


def _file_key(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def _around(part: Tensor, span: tuple[int, int] | None, size: int) -> Tensor:
    """`[..., size]`: zeros with a part `[..., n]` at its place. span: None where it is the whole."""
    return part if span is None else F.pad(part, (span[0], size - span[1]))


class LoraMethod(_LayerMethod):
    """`lora`: w + (alpha / rank) * up @ down (Hu et al., arXiv 2106.09685)."""

    def __init__(self, base: BaseModel, config: Config):
        super().__init__(base, config)
        rank = config.lora.rank
        self.scale = config.lora.alpha / rank
        torch.manual_seed(config.seed)
        self.module = nn.ModuleDict()
        for name, layer in self.structure.layers.items():
            down = nn.Linear(layer.in_features, rank, bias=False)
            up = nn.Linear(rank, layer.out_features, bias=False)
            nn.init.zeros_(up.weight)
            self.module[key_of(name)] = nn.ModuleDict({"down": down, "up": up})

    def _parameters(self, layer: str) -> Iterable[Tensor]:
        return self.module[key_of(layer)].parameters()

    def _pair(self, layers: Sequence[Layer]) -> tuple[Tensor, Tensor]:
        """(down [n * rank, in], up [out, n * rank]) of a linear layer with n parts that are trained."""
        rows, columns = self.modules[layers[0].module_name].weight.shape
        pairs = [(layer, self.module[key_of(layer.name)]) for layer in layers]
        downs = [_around(pair["down"].weight, layer.columns, columns) for layer, pair in pairs]
        ups = [_around(pair["up"].weight.T, layer.rows, rows).T for layer, pair in pairs]
        return torch.cat(downs), torch.cat(ups, 1)

    def linear(self, layers: Sequence[Layer]) -> Linear:
        def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            down, up = (matrix.to(x.dtype) for matrix in self._pair(layers))
            return F.linear(x, weight, bias) + self.scale * F.linear(F.linear(x, down), up)

        return forward

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for name, layers in self._by_module().items():
            down, up = self._pair(layers)
            found[f"{_file_key(name)}.lora_down.weight"] = down
            found[f"{_file_key(name)}.lora_up.weight"] = up
            # Readers divide it by the rank.
            found[f"{_file_key(name)}.alpha"] = torch.tensor(self.config.lora.alpha * len(layers))
        return found


class FullMethod(_LayerMethod):
    """`full`: the weights of the same layers, trained themselves. The file holds the differences."""

    def __init__(self, base: BaseModel, config: Config):
        super().__init__(base, config)
        self._start = {
            name: layer.part_of(self.modules[layer.module_name].weight.detach()).float().clone()
            for name, layer in self.structure.layers.items()
        }
        self.module = nn.ParameterDict({key_of(name): nn.Parameter(w.clone()) for name, w in self._start.items()})

    def _parameters(self, layer: str) -> Iterable[Tensor]:
        return [self.module[key_of(layer)]]

    def linear(self, layers: Sequence[Layer]) -> Linear:
        def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            weight = weight.clone()
            for layer in layers:
                layer.part_of(weight).copy_(self.module[key_of(layer.name)])
            return F.linear(x, weight, bias)

        return forward

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for name, layers in self._by_module().items():
            difference = torch.zeros_like(self.modules[name].weight, dtype=torch.float32)
            for layer in layers:
                trained = self.module[key_of(layer.name)].detach()
                layer.part_of(difference).copy_(trained - self._start[layer.name].to(trained.device))
            found[f"{_file_key(name)}.diff"] = difference
        return found


_METHODS = {"maskunet": MaskMethod, "static_mask": MaskMethod, "lora": LoraMethod, "full": FullMethod}


def build_method(base: BaseModel, config: Config) -> Any:
    """The method of a configuration, its parameters seeded, on the CPU in fp32."""
    if not config.learns_word:
        return _METHODS[config.method](base, config)
    from .embedding.method import EmbeddingMethod

    beside = None
    if config.of_weights:
        # The whole U-Net is checkpointed by the word's method.
        loop = dataclasses.replace(config.loop, checkpointing=False)
        beside = build_method(base, dataclasses.replace(config, method=config.of_weights, loop=loop))
    return EmbeddingMethod(base, config, beside)
