"""Runs in `.parity`: the original packages' features, logits and distances.

`python judges_original.py FOLDER`: FOLDER holds `inception.pth` and `inputs.safetensors`; `original.safetensors` is
written beside them, and in folders of their own the random weights of transformers' models.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from cleanfid.resize import build_resizer
from pytorch_fid import inception
from pytorch_fid.fid_score import calculate_frechet_distance
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedModel,
    SwinConfig,
)


def of_pictures(pictures: dict[str, Tensor], weights: Path) -> Iterator[tuple[str, Tensor]]:
    """Inception's features of pictures `[3, H, W]`, and pictures as clean-fid resizes them."""
    inception.load_state_dict_from_url = lambda *arguments, **options: torch.load(weights, weights_only=True)
    pytorch_fid = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
    fidelity = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    resize = build_resizer("clean")
    for name, picture in pictures.items():
        yield f"pytorch-fid/features of {name}", pytorch_fid(picture[None].float() / 255)[0].flatten()
        yield f"torch-fidelity/features of {name}", fidelity(picture[None])[0].flatten()
        resized = torch.from_numpy(resize(picture.movedim(0, -1).numpy())).movedim(-1, 0)
        yield f"clean-fid/resized {name}", (resized.float() - 128) / 128


def of_sets(first: Tensor, second: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Distances between sets of features."""
    statistics = [(x.mean(0).numpy(), np.cov(x.numpy(), rowvar=False)) for x in (first, second)]
    distance = calculate_frechet_distance(*statistics[0], *statistics[1])
    yield "pytorch-fid/Frechet distance", torch.tensor([distance], dtype=torch.float64)
    how = {"kid_subsets": 1, "kid_subset_size": len(first), "rng_seed": 0, "verbose": False}
    kid = kid_features_to_metric(first, second, **how)[KEY_METRIC_KID_MEAN]
    yield "torch-fidelity/KID", torch.tensor([kid], dtype=torch.float64)


def mask2former() -> PreTrainedModel:
    stages = [f"stage{n}" for n in range(1, 5)]
    swin = SwinConfig(embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], out_features=stages)
    widths = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32}
    layers = {"encoder_layers": 1, "decoder_layers": 4, "num_attention_heads": 4, "num_queries": 12, "num_labels": 80}
    feeding = {"encoder_feedforward_dim": 64, "dim_feedforward": 64}
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, **widths, **layers, **feeding))


def dinov2() -> PreTrainedModel:
    shape = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 1, "mlp_ratio": 1}
    return Dinov2Model(Dinov2Config(**shape, image_size=42, patch_size=14))


def randomly_filled(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Writes the weights into the folder, under the names that published files have."""
    for value in model.parameters():
        value += 0.1 * torch.randn(value.shape)
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def main(folder: Path) -> None:
    torch.manual_seed(20250504)
    inputs = load_file(folder / "inputs.safetensors")
    pictures = {name: value for name, value in inputs.items() if value.dtype == torch.uint8}
    found = dict(of_pictures(pictures, folder / "inception.pth"))
    found |= dict(of_sets(inputs["first"], inputs["second"]))
    detected = randomly_filled(mask2former(), folder / "mask2former")(inputs["to mask2former"])
    found["transformers/Mask2Former classes"] = detected.class_queries_logits
    found["transformers/Mask2Former masks"] = detected.masks_queries_logits
    seen = randomly_filled(dinov2(), folder / "dinov2")(inputs["to dinov2"])
    found["transformers/DINOv2"] = seen.last_hidden_state[:, 0]
    save_file({name: value.contiguous() for name, value in found.items()}, folder / "original.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
