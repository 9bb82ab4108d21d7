"""`python -m tests.parity.authors HYPERUNET`: logits of the authors' classes, on the files of tests/authors_files.py.

HYPERUNET is training/hyperunet.py of github.com/gudaochangsheng/MaskUnet; the golden file was made with commit
0af92d243f4c53d2469e06d8acef6273bf3d4943. Writes tests/core/authors/logits_golden.safetensors: what is `kept` of the map
`S` [3, 80, 160] and, per layer, of the logits before their Gumbel noise, computed in float64 and stored in float32.
"""

import ast
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.authors_files import BLOCK, GOLDEN, GOLDEN_LAYERS, MAP, MAP_STEP, adapters, generators, inputs, kept

MAP_SHARE = 4


def authors_classes(path: Path) -> tuple[type, type]:
    """The two classes without the file's imports (diffusers, accelerate), and without noise: logits come out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = ("DecoderWeightsMaskGenerator", "Adapter")
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in names]
    scope = {"torch": torch, "nn": nn, "F": F, "rearrange": rearrange, "gumbel_sigmoid": lambda logits, **_: logits}
    exec(compile(tree, str(path), "exec"), scope)
    return tuple(scope[name] for name in names)


def load(module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> nn.Module:
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    module.load_state_dict(own)
    return module.double().eval()


@torch.no_grad()
def logits(path: Path, generators: dict[str, Tensor], adapters: dict[str, Tensor], given: dict[str, Tensor]) -> dict:
    """`S` and the logits of GOLDEN_LAYERS by name, whole, in float64."""
    generator_class, adapter_class = authors_classes(path)
    rows, columns = MAP
    generator = generator_class(columns * MAP_SHARE, rows * MAP_SHARE, factor=MAP_SHARE)
    load(generator, generators, f"{BLOCK}.")
    found = {"S": generator((1, 1), given["h"], given["skip"], given["t_emb"], None)}
    for layer in GOLDEN_LAYERS:
        prefix = f"{BLOCK}.{layer}."
        widths = (len(adapters[f"{prefix}{part}.weight"]) for part in ("conv_in", "conv_out"))
        found[layer] = load(adapter_class(rows, columns, *widths), adapters, prefix)(found["S"])
    return found


def main(path: Path) -> None:
    found = logits(path, generators(), adapters(), inputs())
    golden = {"S": kept(found.pop("S"), MAP_STEP).float()} | {
        name: kept(value).float() for name, value in found.items()
    }
    save_file(golden, GOLDEN)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
