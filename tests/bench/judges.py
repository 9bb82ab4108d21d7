"""What a judge of benchmarks takes for a picture of 512x512, on published shapes with random weights."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from PIL.Image import Image

from maskunet_core.judges.blip_vqa import BlipVqa
from maskunet_core.judges.clip import embedded
from maskunet_core.judges.dinov2 import Dinov2
from maskunet_core.judges.inception import PROTOCOLS, Inception
from maskunet_core.judges.mask2former import Mask2Former
from maskunet_core.judges.pictures import levels
from maskunet_core.rewards.clip import ImageTower
from maskunet_core.rewards.clip_layout import ClipLayout
from tests.bench.clock import seconds
from tests.bench.models import blip_vqa_shapes, dinov2_shapes, randomly_filled, vit_shapes
from tests.judge_weights import blobs, inception_weights

_GOLDEN = Path(__file__).parents[1] / "core" / "judges" / "inception.json"
_CLIPS = {
    "CLIP ViT-B/32": (768, 32, 224, 12, 512),
    "CLIP ViT-B/16": (768, 16, 224, 12, 512),
    "CLIP ViT-L/14": (1024, 14, 224, 24, 768),
    "CLIP ViT-L/14 at 336 (CMMD)": (1024, 14, 336, 24, 768),
}
_QUESTIONS = ("a green bench?", "a blue bowl?")
"""As many as a prompt of T2I-CompBench has, nearly."""


def _judges() -> Iterator[tuple[str, Callable[[Image], Any]]]:
    """Each is made when the one before it is done."""
    convolutions = json.loads(_GOLDEN.read_text(encoding="utf-8"))["convolutions"]
    inception = Inception.from_tensors(inception_weights(convolutions)).requires_grad_(False)
    yield "Inception, one protocol", lambda picture: inception(PROTOCOLS["clean"].drawn(picture)[None])
    for name, (width, *rest) in _CLIPS.items():
        layout = ClipLayout(quick=True, image_heads=width // 64, text_heads=8)
        with torch.device("meta"):
            tower = ImageTower(vit_shapes(width, *rest), layout)
        clip = SimpleNamespace(image=randomly_filled(tower))
        yield name, lambda picture, clip=clip: embedded(clip, [picture])
    with torch.device("meta"):
        dinov2 = Dinov2(dinov2_shapes(), "", 16)
    dinov2 = randomly_filled(dinov2)
    yield "DINOv2 ViT-L/14", lambda picture: dinov2.features([picture])
    with torch.device("meta"):
        blip = BlipVqa(blip_vqa_shapes())
    blip = randomly_filled(blip)
    yield f"BLIP-VQA, {len(_QUESTIONS)} questions", lambda picture: blip.answers(picture, _QUESTIONS)
    with torch.device("meta"):
        detector = Mask2Former(_detector_shapes())
    detector = randomly_filled(detector)
    yield "Mask2Former", lambda picture: detector.detect(levels(picture))


def _detector_shapes() -> dict[str, torch.Tensor]:
    """Those that tell the detector's size: Swin-S, and a head of 100 queries."""
    shapes: dict[str, tuple[int, ...]] = {"backbone.patch_embed.projection.weight": (96, 3, 4, 4)}
    for stage, depth in enumerate((2, 2, 18, 2)):
        width, name = 96 * 2**stage, f"backbone.stages.{stage}"
        shapes[f"{name}.blocks.0.attn.w_msa.relative_position_bias_table"] = (169, 3 * 2**stage)
        shapes |= {f"{name}.blocks.{n}.norm1.weight": (width,) for n in range(depth)}
        shapes[f"{name}.blocks.0.ffn.layers.0.0.bias"] = (4 * width,)
        shapes |= {f"{name}.downsample.reduction.weight": (2 * width, 4 * width)} if stage < 3 else {}
    head, inner = "panoptic_head.", "ffns.0.layers.0.0.bias"
    shapes |= {f"{head}query_feat.weight": (100, 256), f"{head}cls_embed.bias": (81,)}
    shapes |= {f"{head}transformer_decoder.layers.{n}.{inner}": (2048,) for n in range(9)}
    shapes |= {f"{head}pixel_decoder.encoder.layers.{n}.{inner}": (1024,) for n in range(6)}
    shapes[f"{head}pixel_decoder.encoder.layers.0.attentions.0.sampling_offsets.bias"] = (192,)
    widths = zip(("input_convs.0", "input_convs.1", "input_convs.2", "lateral_convs.0"), (768, 384, 192, 96))
    shapes |= {f"{head}pixel_decoder.{name}.conv.weight": (256, width, 1, 1) for name, width in widths}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def measure(turns: int) -> list[dict[str, Any]]:
    """A row for each judge: the median of some turns."""
    picture, rows = blobs(512, 512, 1), []
    for name, judged in _judges():
        times = [seconds(lambda judged=judged: judged(picture)) for _ in range(turns)]
        rows.append({"judge": name, "seconds": round(median(times), 2), "turns": turns})
    return rows
