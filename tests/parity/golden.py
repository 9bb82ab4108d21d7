"""`python -m tests.parity.golden`: scores and gradients of the original packages, on the tests' reward files.

Writes tests/core/published/rewards_golden.safetensors, which the tests compare with. Per reward: `scores` [3], of each
of `golden_pictures` under the prompt of its place, and `gradient` [3, 3, H, W] of the score with respect to the
picture, in float64; the prompts are in the metadata.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.parity.__main__ import scores_of_original, write_inputs
from tests.parity.environment import PACKAGES, ParityError
from tests.reward_files import GOLDEN_PIXELS, PUBLISHED, golden_pictures, hps_tensors, image_reward_tensors
from trainer.host import enter_host

PROMPTS = [
    "A red dog and a green cat, highly detailed, 4k!",
    # Longer than either tokeniser takes.
    "unfathomable café naïve 東京 photo-realistic portraiture of an axolotl, in the style of Caravaggio, dramatic "
    "chiaroscuro lighting, volumetric fog, ultra wide angle lens, trending on artstation, a b c d e f g h i j k l m "
    "n o p q r s t u v w x y z 1 2 3 4 5 6 7 8 9 0 supercalifragilistic",
    "",
]


def main() -> None:
    enter_host()
    images = {reward: golden_pictures(reward) for reward in GOLDEN_PIXELS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder, image_reward_tensors(), hps_tensors(), images, PROMPTS)
        original = scores_of_original(folder)
    golden = {
        f"{reward}/{what}": torch.stack(
            [original[f"{reward}/crop/{reward}/{n}/{what}"][n] for n in range(len(PROMPTS))]
        )
        for reward in GOLDEN_PIXELS
        for what in ("scores", "gradient")
    }
    metadata = {"prompts": json.dumps(PROMPTS), "original": json.dumps(PACKAGES)}
    save_file(golden, PUBLISHED / "rewards_golden.safetensors", metadata)


if __name__ == "__main__":
    try:
        main()
    except ParityError as error:
        sys.exit(f"[parity] {error}")
