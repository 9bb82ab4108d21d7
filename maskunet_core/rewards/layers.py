"""What the architectures of the rewards share: attention, runs of blocks, modules filled from files."""

import re
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import MaskUNetError

_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class BadTensors(MaskUNetError):
    """Tensors that do not make up the model; the message goes on after the file's name: "lacks the tensor ...: ..."."""

    def __init__(self, what: str, mend: str = "it is damaged. Download it again."):
        super().__init__(f"{what}: {mend}")


def attend(
    query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool = False, seen: Tensor | None = None
) -> Tensor:
    """Multi-head attention of `[B, N, width]` queries over `[B, M, width]` keys and values.

    seen: `[B, 1, N, M]` bool, which keys a query looks at.
    """
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=causal)
    return found.transpose(1, 2).flatten(2)


def heads_of(width: int) -> int:
    """Number of heads, which the files do not tell: they are 64 wide, but in the largest image towers of CLIP."""
    return max(1, width // 64)


def run(blocks: Iterable[nn.Module], x: Tensor, *context: Tensor, checkpointing: bool) -> Tensor:
    """The blocks one after the other; with `checkpointing` the backward pass computes each one's inside anew."""
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, *context, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, *context)
    return x


class LinearChain(nn.Module):
    """Linear layers with nothing between them, under the names of the published heads: `layers.0`, `layers.2`, ..."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = ""):
        super().__init__()
        pattern = re.compile(re.escape(prefix) + r"layers\.(\d+)\.weight")
        found = {int(match[1]): tensors[name].shape for name in tensors if (match := pattern.fullmatch(name))}
        layers, width = {}, None
        for index, shape in sorted(found.items()):
            if len(shape) != 2 or width not in (None, shape[1]):
                name, rows = f"{prefix}layers.{index}.weight", "" if width is None else f" of {width} columns"
                raise BadTensors(f"holds the tensor {name} in the shape {tuple(shape)}, where a matrix{rows} fits")
            width, columns = shape
            layers[str(index)] = nn.Linear(columns, width)
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def depth_of(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Number of blocks whose tensors are called `prefix` + number + "."."""
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})


def fill(module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype, prefix: str = "") -> nn.Module:
    """The module with copies of its tensors in `dtype`, frozen; `tensors` may hold more than it needs.

    prefix: what the names in `tensors` have before the module's. Raises BadTensors.
    """
    state = {}
    for own, wanted in module.state_dict().items():
        name = prefix + own
        if name not in tensors:
            raise BadTensors(f"lacks the tensor {name}")
        if tensors[name].shape != wanted.shape:
            found, expected = tuple(tensors[name].shape), tuple(wanted.shape)
            raise BadTensors(f"holds the tensor {name} in the shape {found}, where {expected} fits the others")
        state[own] = tensors[name].to(dtype, copy=True).contiguous()
        if not state[own].isfinite().all():
            if tensors[name].float().isfinite().all():
                raise BadTensors(f"holds numbers in {name} that {_NAMES[dtype]} cannot", "choose another dtype.")
            raise BadTensors(f"holds numbers in {name} that are NaN or infinite")
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)
