"""Inception's features and the ways to bring a picture to it, held against the reference packages."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from maskunet_core.judges import inception
from maskunet_core.judges.inception import PROTOCOLS, Inception
from tests.judge_weights import blobs, edges, inception_weights, noise

FOLDER = Path(__file__).with_name("judges")
GOLDEN = json.loads((FOLDER / "inception.json").read_text(encoding="utf-8"))
EXPECTED = load_file(FOLDER / "inception.safetensors")
GREY = {
    "cleanfid_clean": lambda picture: 128 * PROTOCOLS["clean"].drawn(picture) + 128,
    "torch_fidelity": lambda picture: 128 * PROTOCOLS["torch-fidelity"].drawn(picture) + 128,
    "pytorch_fid": lambda picture: (PROTOCOLS["pytorch-fid"].drawn(picture) + 1) / 2,
    "t2ibenchmark": lambda picture: 255 * (PROTOCOLS["t2ibenchmark"].drawn(picture) + 1) / 2,
    "bk_sdm_256": lambda picture: inception.levels(inception._small(picture)).float(),
}
"""In the units that the golden numbers have."""


@pytest.fixture(scope="module")
def model() -> Inception:
    return Inception.from_tensors(inception_weights(GOLDEN["convolutions"]))


@pytest.mark.parametrize(
    ("protocol", "name"),
    [("clean", "cleanfid_clean"), ("pytorch-fid", "pytorch_fid"), ("torch-fidelity", "torch_fidelity")],
)
@pytest.mark.parametrize("picture", GOLDEN["pictures"], ids=str)
@torch.no_grad()
def test_features_are_those_of_the_reference(model, picture, protocol, name):
    found = model(PROTOCOLS[protocol].drawn(blobs(*picture))[None])[0]
    expected = EXPECTED[f"{picture[0]}x{picture[1]}.{name}_2048"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("row", GOLDEN["resized"]["rows"], ids=lambda row: row["key"])
def test_pictures_are_resized_to_the_grey_level_as_each_protocol_does(row):
    picture, pipeline = row["key"].split(".")
    of_kind = {"blobs": blobs, "noise": noise, "edges": edges}
    sizes = {f"{h}x{w}_{kind}": of_kind[kind](h, w, seed) for h, w, seed, kind in GOLDEN["resized"]["pictures"]}
    found = GREY[pipeline](sizes[picture])[:, row["first"] :: row["step"], row["first"] :: row["step"]]
    expected = EXPECTED[row["key"]].float()
    expected = expected.movedim(-1, 0) if row["layout"] == "hwc" else expected
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 if "pytorch" not in pipeline else 1e-6)


def test_protocols_differ_where_pictures_have_edges():
    pictures = {name: protocol.drawn(edges(512, 512, 0)) for name, protocol in PROTOCOLS.items()}
    assert all(x.shape == (3, 299, 299) and x.abs().max() < 1 + 1e-6 for x in pictures.values())
    assert (pictures["clean"] - pictures["pytorch-fid"]).abs().mean() > 0.1
    assert (pictures["pytorch-fid"] - pictures["torch-fidelity"]).abs().mean() > 0.1
    wide = Image.new("RGB", (640, 427), "white")
    wide.paste("black", (0, 0, 60, 427))
    # What is cut away on the left is not seen.
    assert PROTOCOLS["clean-crop"].real(wide).min() > 0.9
    assert PROTOCOLS["clean"].real(wide).min() < -0.9
