"""The methods of a configuration: mask generators, and the baselines that they are measured against."""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from maskunet_core.masks.generator import key_of
from maskunet_core.models.structure import Layer
from maskunet_core.replacing import replacing
from maskunet_core.seam.layers import Linear, replaced_linears
from maskunet_core.training.base import BaseModel
from maskunet_core.training.method import MaskMethod, Method

from .config import Config


class _LayerMethod(Method):
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
