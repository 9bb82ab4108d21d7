"""GenEval's detector, rules and colours, held against its own code and mmdetection's."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maskunet_core.judges import geneval
from maskunet_core.judges.clip import embedded
from maskunet_core.judges.files import DETECTOR as DETECTOR_FILE
from maskunet_core.judges.files import DETECTOR_STAND_IN
from maskunet_core.judges.geneval import Colours, Found
from maskunet_core.judges.mask2former import Detections, Mask2Former, prepare
from maskunet_core.judges.mask2former_names import to_mmdet2
from maskunet_core.judges.pictures import levels
from maskunet_core.rewards.clip import ClipReward
from maskunet_core.rewards.clip_layout import ClipLayout
from tests.judge_files import detector_tensors
from tests.judge_weights import blobs, scaled, weights

FOLDER = Path(__file__).with_name("judges")


def golden(name: str):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


DETECTOR, RULES, COLOUR = (golden(name) for name in ("mask2former", "geneval", "geneval_colour"))


def rows_of(found: Detections) -> torch.Tensor:
    """Class, box and score, in an order that ties do not change."""
    rows = torch.cat([found.classes[:, None].float(), found.boxes, found.scores[:, None]], 1)
    return in_order(rows)


def in_order(rows: torch.Tensor) -> torch.Tensor:
    return torch.stack(sorted(rows, key=lambda row: (float(row[0]), round(-float(row[5]), 4), float(row[1]))))


@pytest.mark.parametrize("case", DETECTOR["cases"], ids=lambda case: case["key"])
def test_detections_are_mmdetections(case):
    expected = load_file(FOLDER / "mask2former.safetensors")
    model = Mask2Former.from_tensors(detector_tensors(case["weights_seed"]))
    picture = levels(blobs(*case["picture"]))
    pixels, _ = prepare(picture)
    assert list(pixels.shape) == case["net_input"]
    classes, masks = (x[0] for x in model(pixels))
    for found, name in ((classes, "class_logits"), (masks[:, ::8, ::8], "mask_logits_every_8th")):
        of_case = expected[f"{case['key']}.{name}"]
        assert float((found - of_case).abs().max() / of_case.abs().max()) < 1e-5, name
    found, detections = rows_of(model.detect(picture, kept=20)), in_order(expected[f"{case['key']}.detections"])
    assert torch.equal(found[:, :5], detections[:, :5])
    torch.testing.assert_close(found[:, 5], detections[:, 5], rtol=0, atol=1e-5)


def test_files_of_mmdetection_3_are_read_too():
    tensors = detector_tensors(6)
    names = {
        name: name.replace("encoder.layers.0.attentions.0.", "encoder.layers.0.self_attn.")
        .replace("decoder.layers.0.attentions.0.", "decoder.layers.0.cross_attn.")
        .replace("decoder.layers.0.attentions.1.", "decoder.layers.0.self_attn.")
        .replace("layers.0.ffns.0.", "layers.0.ffn.")
        for name in tensors
    }
    newer = {names[name]: value for name, value in tensors.items()}
    assert newer.keys() != tensors.keys()
    assert to_mmdet2(newer).keys() == tensors.keys()


def test_transformers_detector_is_read_from_its_file_and_gives_its_logits(tmp_path):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = [f"stage{n}" for n in range(1, 5)]
    swin = SwinConfig(embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], out_features=stages)
    widths = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32}
    layers = {"encoder_layers": 1, "decoder_layers": 4, "num_attention_heads": 4, "num_queries": 12, "num_labels": 80}
    config = Mask2FormerConfig(backbone_config=swin, **widths, **layers, encoder_feedforward_dim=64, dim_feedforward=64)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    stream = torch.Generator().manual_seed(3)
    for value in model.parameters():
        value.data += 0.1 * torch.randn(value.shape, generator=stream)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    assert DETECTOR_STAND_IN.find([path]) == path
    assert DETECTOR_FILE.find([path]) is None
    pictures = torch.randn(1, 3, 288, 320, generator=stream)
    with torch.no_grad():
        expected, (classes, masks) = model(pictures), DETECTOR_STAND_IN.load(path)(pictures)
    for found, of_reference in ((classes, expected.class_queries_logits), (masks, expected.masks_queries_logits)):
        assert float((found - of_reference).abs().max() / of_reference.abs().max()) < 1e-5


@pytest.mark.parametrize("case", RULES["cases"], ids=lambda case: case["name"])
def test_pictures_are_right_or_wrong_for_genevals_reasons(case):
    found: dict[str, list[Found]] = {}
    for name, *box, score in case["detections"]:
        found.setdefault(name, []).append(Found(tuple(box), score))
    objects = geneval.kept(found, case["metadata"]["tag"])
    assert {name: len(group) for name, group in objects.items()} == case["expected"]["kept"]
    colours = case["colors"] or {}
    faults = geneval.judge(objects, case["metadata"], lambda name, group: colours[name][: len(group)])
    wrong = [fault.published for fault in faults]
    assert "\n".join(wrong) == case["expected"]["reason"]
    assert (not wrong) == case["expected"]["correct"]


def test_relations_of_boxes_are_genevals():
    for first, second, expected, _ in RULES["relations"]:
        assert set(geneval.relations(first, second)) == set(expected), (first, second)


@pytest.fixture(scope="module")
def colours() -> Colours:
    tensors = scaled(weights(COLOUR["layout"], 21), {"positional_embedding": 0.3, "class_embedding": 0.3})
    layout = ClipLayout(quick=True, image_heads=2, text_heads=2)
    return Colours(ClipReward.from_tensors("clip", tensors, torch.float32, scaled=False, layout=layout))


def ellipse(box: list[float], height: int, width: int) -> torch.Tensor:
    x0, y0, x1, y1 = box
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1


@pytest.mark.parametrize("case", COLOUR["cases"], ids=lambda case: case["classname"])
def test_colours_are_genevals(case, colours):
    expected = load_file(FOLDER / "geneval_colour.safetensors")
    height, width, _ = COLOUR["picture"]
    picture, name = blobs(*COLOUR["picture"]), case["classname"]
    found = [Found(tuple(box), 1.0, ellipse(box, height, width)) for box in COLOUR["boxes"]]
    sentences = colours.sentences(name)
    torch.testing.assert_close(sentences, expected["classifier." + name.replace(" ", "_")], rtol=0, atol=1e-5)
    seen = embedded(colours.clip, [colours.crop(picture, one) for one in found])
    torch.testing.assert_close(seen, expected["image_features"], rtol=0, atol=1e-5)
    assert colours.of(picture)(name, found) == case["colors"]
