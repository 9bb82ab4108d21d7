"""DINOv2's features, held against transformers and against the published network's own places."""

import numpy as np
import pytest
import torch
from torchvision import transforms

from maskunet_core.judges.dinov2 import Dinov2, prepare
from maskunet_core.judges.files import BLIP_VQA, DINOV2
from maskunet_core.rewards.files import BadRewardFile
from tests.judge_weights import blobs, dinov2_model, noise

RESIZED = [
    *([-0.75157, 0.85537], [0.43608, -0.19559], [0.09607, 0.86883], [-0.77662, -0.59863], [-0.69919, 1.40912]),
    *([0.05718, 1.53187], [0.42873, 0.12806], [0.04781, -0.4973], [-0.46317, 1.31471], [-1.22024, -0.45912]),
]
"""Of places of 7x7 patches for 3x3, by facebookresearch/dinov2's `interpolate_pos_encoding` (commit 027a9ac3)."""


@pytest.fixture(scope="module")
def reference():
    return dinov2_model(seed=3)


@pytest.fixture(scope="module")
def file(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    reference.save_pretrained(folder)
    return folder / "model.safetensors"


def test_features_are_transformers(reference, file):
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = reference(pixels).last_hidden_state, DINOV2.load(file)(pixels)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_the_published_layout_is_read_and_recognised(file, tmp_path):
    model, published, registers = DINOV2.load(file), tmp_path / "dinov2.pth", tmp_path / "reg.pth"
    tensors = model.state_dict() | {"mask_token": torch.zeros(1, 1024)}
    torch.save(tensors, published)
    torch.save(tensors | {"register_tokens": torch.zeros(1, 4, 1024)}, registers)
    assert DINOV2.find([registers, published]) == published
    assert DINOV2.find([file]) == file
    assert BLIP_VQA.find([file, published]) is None
    pictures = [blobs(40, 50, 1), noise(30, 30, 2)]
    found = DINOV2.load(published).features(pictures)
    assert found.shape == (2, 1024)
    assert torch.equal(found, model.features(pictures))
    assert not torch.allclose(found[0], found[1], atol=1e-2)
    del tensors["blocks.0.ls2.gamma"]
    torch.save(tensors, published)
    with pytest.raises(BadRewardFile, match=r"'dinov2.pth' lacks the tensor blocks.0.ls2.gamma"):
        DINOV2.load(published)


def test_places_are_resized_as_the_published_network_does():
    layout = {"pos_embed": [1, 50, 2], "patch_embed.proj.weight": [2, 3, 14, 14], "blocks.0.mlp.fc1.bias": [4]}
    with torch.device("meta"):
        model = Dinov2({name: torch.empty(shape) for name, shape in layout.items()}, "", 1)
    stream = np.random.Generator(np.random.Philox(5))
    model.pos_embed = torch.nn.Parameter(torch.from_numpy(stream.standard_normal((1, 50, 2)).astype(np.float32)))
    torch.testing.assert_close(model.positions(3, 3)[0], torch.tensor(RESIZED), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 60), (512, 512)])
def test_pictures_are_squashed_as_by_torchvision(size):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    resize = transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC)
    expected = transforms.Compose([resize, transforms.ToTensor(), transforms.Normalize(mean, std)])(noise(*size, 1))
    torch.testing.assert_close(prepare(noise(*size, 1)), expected, rtol=0, atol=1e-6)
