"""The imitated device refuses what a card refuses, and computes what the CPU computes."""

import os
import subprocess
import sys

from trainer.host import PROJECT

SCRIPT = """
import torch
import torch.nn.functional as F
from tests.device import DEVICE

def refused(action):
    try:
        action()
    except RuntimeError as error:
        return "device" in str(error)
    return False

assert DEVICE.type == "imitated"
x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
here, there = x.clone().requires_grad_(), x.to(DEVICE).requires_grad_()
layer = torch.nn.Conv2d(3, 4, 3)
for place, tensor in (("cpu", here), (DEVICE, there)):
    layer.to(place)
    rows = F.silu(layer(tensor)).flatten(2)
    F.scaled_dot_product_attention(rows, rows, rows).square().sum().backward()
assert there.grad.device == DEVICE
torch.testing.assert_close(there.grad.cpu(), here.grad)
assert refused(lambda: there + x)
assert refused(lambda: layer(x))
assert refused(lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()))
assert refused(lambda: torch.rand(3, generator=torch.Generator(DEVICE)))
assert (there + torch.tensor(1.0)).device == DEVICE
assert there[[1, 0]].device == DEVICE
with torch.inference_mode():
    part = torch.zeros(2, 2, device=DEVICE)
    part[0].fill_(3)
    assert part.cpu().tolist() == [[3, 3], [0, 0]]
"""


def test_it_has_a_cards_rules_and_the_cpus_numbers():
    environment = os.environ | {"MASKUNET_TEST_DEVICE": "imitated", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
