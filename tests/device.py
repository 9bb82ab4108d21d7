"""The device that tests run on: the CPU, unless MASKUNET_TEST_DEVICE says `cuda` (also for ROCm), `mps` or `imitated`.

What is promised where:

- On every device, the same bits where the same work is done again: masks off, recorded and replayed, one seed twice,
  a model's weights before and after a run. Tests say so by `torch.equal`.
- On the CPU alone, the same bits where the same numbers are found in another way: in a batch of another size, or by
  another kernel. Tests say so by `assert_same_bits_on_cpu`, with the tolerance of the other devices.

Tests run in fp32 on every device, with deterministic kernels where there are any. Half precision is for `tests/gpu`.
"""

import os
from typing import Any

NAME = os.environ.get("MASKUNET_TEST_DEVICE", "cpu")
if NAME == "cpu":
    # accelerate and the servers that tests start look for cards themselves.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402 - after the choice above

if NAME == "imitated":
    from tests.gpu import imitation

    DEVICE = imitation.install()
else:
    DEVICE = torch.device(NAME)


def use_in_host() -> None:
    """The host loads and runs models on DEVICE. After `enter_host`, before models are loaded."""
    from comfy.cli_args import args

    args.cpu = NAME == "cpu"
    if args.cpu:
        return
    args.force_fp32 = args.deterministic = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if NAME == "imitated":
        imitation.enter_host()


def loaded(reward: Any, vae: Any = None) -> Any:
    """The reward, moved to DEVICE with the VAE: where the nodes have them when pictures are scored or searched for."""
    for module in [*reward.modules(), *([] if vae is None else [vae.first_stage_model])]:
        module.to(DEVICE)
    return reward


def assert_same_bits_on_cpu(actual: torch.Tensor, expected: torch.Tensor, rtol: float, atol: float) -> None:
    """Equal bits on the CPU, and within the tolerance on other devices."""
    if NAME == "cpu":
        rtol = atol = 0.0
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
