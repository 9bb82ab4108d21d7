"""`make parity`: fresh random weights in published layouts, scored by the original packages and by ours.

Writes output/parity/table.md and table.json; ends with an error where anything differs by more than 1e-5, relative to
the largest score or gradient of the original.
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.parity.environment import run_original
from tests.parity.told import TOLERANCE, end_with, tell
from tests.reward_files import (
    HPS_LAYOUT,
    IMAGE_REWARD_HEADS,
    PUBLISHED,
    WRONGLY_DECODED,
    clip_model,
    hps_tensors,
    image_reward_tensors,
    redrawn,
)
from trainer.host import PROJECT, enter_host, find_host

SEED = 20250503
SHAPES = {"square": (48, 48), "wide": (40, 96), "tall": (70, 33)}
MED_CONFIG = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "vocab_size": 30524,
    "add_cross_attention": True,
    "encoder_width": 64,
    "type_vocab_size": 2,
    "add_type_embeddings": False,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}


def prompts() -> list[str]:
    found = json.loads((PUBLISHED / "tokens_golden.json").read_text(encoding="utf-8"))["prompts"]
    return [prompt for prompt in found if prompt != WRONGLY_DECODED]


def write_inputs(
    folder: Path,
    image_reward: dict[str, Tensor],
    hps: dict[str, Tensor],
    images: dict[str, Tensor],
    prompts: list[str],
) -> None:
    """What original.py reads. images: a batch `[B, 3, H, W]` by name; PickScore's weights are always drawn anew."""
    torch.save(image_reward, folder / "ImageReward.pt")
    (folder / "ImageReward.json").write_text(json.dumps(MED_CONFIG))
    torch.save({"state_dict": hps}, folder / "HPS_v2.1_compressed.pt")
    model = clip_model()
    save_file(redrawn(model.state_dict(), SEED + 2), folder / "PickScore.safetensors")
    halves = ("text_config", "vision_config")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    config = {half: {name: getattr(getattr(model.config, half), name) for name in names} for half in halves}
    config["vision_config"] |= {"image_size": 28, "patch_size": 14}
    (folder / "PickScore.json").write_text(json.dumps(config | {"projection_dim": model.config.projection_dim}))
    save_file(images, folder / "images.safetensors")
    (folder / "prompts.json").write_text(json.dumps(prompts))


def write_fresh_inputs(folder: Path) -> None:
    stream = torch.Generator().manual_seed(SEED)
    images = {name: torch.rand(2, 3, *shape, generator=stream) for name, shape in SHAPES.items()}
    image_reward, hps = redrawn(image_reward_tensors(), SEED), redrawn(hps_tensors(), SEED + 1)
    write_inputs(folder, image_reward, hps, images, prompts())


def scores_of_original(folder: Path) -> dict[str, Tensor]:
    vocabulary = PROJECT / "maskunet_core" / "rewards" / "bert-base-uncased" / "vocab.txt"
    merges = find_host() / "comfy" / "sd1_tokenizer" / "merges.txt"
    run_original("original.py", folder, vocabulary, merges)
    return load_file(folder / "original.safetensors")


def our_rewards(folder: Path) -> dict:
    """Ours, from the same files; the tiny models' numbers of heads do not follow from their widths."""
    from maskunet_core.rewards.blip import ImageReward
    from maskunet_core.rewards.clip import ClipReward
    from maskunet_core.rewards.files import load, read_tensors

    blip, clip = read_tensors(folder / "ImageReward.pt"), read_tensors(folder / "HPS_v2.1_compressed.pt")
    return {
        "ImageReward": ImageReward.from_tensors("", blip, torch.float32, heads=IMAGE_REWARD_HEADS),
        "HPSv2.1": ClipReward.from_tensors("", clip, torch.float32, scaled=False, layout=HPS_LAYOUT),
        "PickScore": load(folder / "PickScore.safetensors"),
    }


def compare(folder: Path, original: dict[str, Tensor]) -> list[dict]:
    """A row per reward, framing and shape of the pictures, over all prompts."""
    from maskunet_core.rewards.preprocess import letterbox
    from maskunet_core.rewards.reward import value_and_gradient

    images, rewards, rows = load_file(folder / "images.safetensors"), our_rewards(folder), []
    for name, framing, shape in sorted({tuple(key.split("/")[:3]) for key in original if "/tokens/" not in key}):
        differences, largest = {"scores": 0.0, "gradient": 0.0}, {"scores": 0.0, "gradient": 0.0}
        for n, prompt in enumerate(prompts()):
            bound, leaf = rewards[name].bind(prompt), images[shape].clone().requires_grad_()
            boxed = letterbox(leaf, bound.size) if framing == "letterbox" else leaf
            scores, slope = value_and_gradient(bound, boxed)
            (gradient,) = torch.autograd.grad(boxed, leaf, slope)
            for what, value in (("scores", scores), ("gradient", gradient)):
                expected = original[f"{name}/{framing}/{shape}/{n}/{what}"]
                differences[what] = max(differences[what], float((value - expected).abs().max()))
                largest[what] = max(largest[what], float(expected.abs().max()))
        relative = {what: differences[what] / largest[what] for what in differences}
        rows.append(
            {
                "reward": name,
                "framing": framing,
                "pictures": "x".join(map(str, SHAPES[shape])),
                "prompts": len(prompts()),
                "score, largest relative difference": f"{relative['scores']:.1e}",
                "gradient, largest relative difference": f"{relative['gradient']:.1e}",
                "equal": all(value <= TOLERANCE for value in relative.values()),
            }
        )
    return rows


def compare_tokens(original: dict[str, Tensor]) -> list[dict]:
    from maskunet_core.rewards.tokens import bert_tokens, clip_tokens

    rows = []
    for name, tokens in (("ImageReward", lambda prompt: bert_tokens(prompt)[0]), ("HPSv2.1", clip_tokens)):
        same = [torch.equal(tokens(prompt), original[f"{name}/tokens/{n}"]) for n, prompt in enumerate(prompts())]
        rows.append({"reward": name, "framing": "token ids", "prompts": len(same), "equal": all(same)})
    return rows


def main() -> int:
    enter_host()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_fresh_inputs(folder)
        original = scores_of_original(folder)
        rows = compare(folder, original) + compare_tokens(original)
    return tell(rows, SEED)


if __name__ == "__main__":
    end_with(main)
