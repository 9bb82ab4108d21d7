"""Runs in `.parity`: the original packages' tokens, scores and image gradients.

`python original.py FOLDER BERT_VOCABULARY CLIP_MERGES`: FOLDER holds the weight files, `images.safetensors` and
`prompts.json`; `original.safetensors` is written beside them. The packages' own `__init__` files are passed by: they
import training code, a window toolkit and packages that nobody declares.
"""

import gzip
import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def bare_package(name: str, folder: Path) -> None:
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def prepare(merges: Path) -> None:
    """What must be in place before the packages' modules can be imported."""
    folders = {name: Path(importlib.util.find_spec(name).origin).parent for name in ("ImageReward", "hpsv2")}
    bare_package("ImageReward", folders["ImageReward"])
    bare_package("ImageReward.models", folders["ImageReward"] / "models")
    bare_package("hpsv2", folders["hpsv2"])
    bare_package("hpsv2.src", folders["hpsv2"] / "src")
    sys.modules["turtle"] = types.ModuleType("turtle")
    sys.modules["turtle"].forward = None
    name = "fairscale.nn.checkpoint.checkpoint_activations"
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].checkpoint_wrapper = None
    vocabulary = folders["hpsv2"] / "src" / "open_clip" / "bpe_simple_vocab_16e6.txt.gz"
    vocabulary.write_bytes(gzip.compress(merges.read_bytes()))


def prepared(size: int) -> Compose:
    return Compose([Resize(size, InterpolationMode.BICUBIC, antialias=True), CenterCrop(size), Normalize(MEAN, STD)])


def image_reward(folder: Path, vocabulary: Path):
    """The original class, its sizes those of the file. Returns (prompt, pixels) -> score, its size, tokens."""
    from ImageReward import ImageReward as module
    from ImageReward.models.BLIP import blip, blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer
    from transformers import BertTokenizer

    class Tokenizer(BertTokenizer):
        @classmethod
        def from_pretrained(cls, name):
            return BertTokenizer(str(vocabulary))

    tiny = json.loads((folder / "ImageReward.json").read_text())
    tower = VisionTransformer(img_size=32, patch_size=16, embed_dim=64, depth=3, num_heads=4)
    blip.BertTokenizer = Tokenizer
    blip_pretrain.create_vit = lambda *arguments: (tower, 64)
    width, mlp = tiny["hidden_size"], module.MLP
    module.MLP = lambda _: mlp(width)
    model = module.ImageReward(str(folder / "ImageReward.json"))
    loaded = model.load_state_dict(torch.load(folder / "ImageReward.pt", weights_only=True), strict=False)
    assert not loaded.missing_keys
    assert loaded.unexpected_keys in ([], ["blip.text_encoder.embeddings.position_ids"])
    model = model.double().eval()

    def tokens(prompt: str) -> dict[str, torch.Tensor]:
        return model.blip.tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")

    def score(prompt: str, pixels: torch.Tensor) -> torch.Tensor:
        told = tokens(prompt)
        count = len(pixels)
        ids, mask = (told[name].expand(count, -1) for name in ("input_ids", "attention_mask"))
        return model.score_gard(ids, mask, pixels).squeeze(1)

    return score, 32, lambda prompt: tokens(prompt)["input_ids"][0]


def hps(folder: Path):
    from hpsv2.src.open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    from hpsv2.src.open_clip.tokenizer import tokenize

    vision = CLIPVisionCfg(layers=3, width=80, head_width=20, patch_size=14, image_size=28)
    text = CLIPTextCfg(context_length=77, vocab_size=49408, width=32, heads=4, layers=2)
    model = CLIP(32, vision, text, output_dict=True)
    model.load_state_dict(torch.load(folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"])
    model = model.double().eval()

    def score(prompt: str, pixels: torch.Tensor) -> torch.Tensor:
        outputs = model(pixels, tokenize([prompt]))
        return (outputs["image_features"] @ outputs["text_features"].T).squeeze(1)

    return score, 28, lambda prompt: tokenize([prompt])[0]


def pickscore(folder: Path, tokens):
    from transformers import CLIPConfig, CLIPModel

    model = CLIPModel(CLIPConfig(**json.loads((folder / "PickScore.json").read_text())))
    model.load_state_dict(load_file(folder / "PickScore.safetensors"))
    # In single precision: this version's attention mask overflows in double.
    model = model.eval()

    def score(prompt: str, pixels: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens(prompt)[None], pixel_values=pixels.float()).logits_per_image.squeeze(1)

    return score, 28, None


def main(folder: Path, vocabulary: Path, merges: Path) -> None:
    prepare(merges)
    from hpsv2.src.open_clip.transform import ResizeMaxSize

    images, prompts = load_file(folder / "images.safetensors"), json.loads((folder / "prompts.json").read_text())
    rewards = {"ImageReward": image_reward(folder, vocabulary), "HPSv2.1": hps(folder)}
    rewards["PickScore"] = pickscore(folder, rewards["HPSv2.1"][2])
    found = {}
    for name, (score, size, tokens) in rewards.items():
        framings = {"crop": prepared(size)}
        if name == "HPSv2.1":
            framings["letterbox"] = Compose([ResizeMaxSize(size), Normalize(MEAN, STD)])
        for n, prompt in enumerate(prompts):
            if tokens is not None:
                found[f"{name}/tokens/{n}"] = tokens(prompt).contiguous()
            for shape, batch in images.items():
                for framing, prepare_images in framings.items():
                    leaf = batch.double().requires_grad_()
                    pixels = torch.stack([prepare_images(image) for image in leaf])
                    scores = score(prompt, pixels)
                    key = f"{name}/{framing}/{shape}/{n}"
                    found[f"{key}/scores"] = scores.detach()
                    (found[f"{key}/gradient"],) = torch.autograd.grad(scores.sum(), leaf)
    save_file(found, folder / "original.safetensors")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
