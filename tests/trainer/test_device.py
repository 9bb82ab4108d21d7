"""The trainer away from the CPU, as far as a CPU can play another device."""

import platform
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from maskunet_core.errors import MaskUNetError
from maskunet_core.seam.attention import attention_notice, differentiable_attention
from maskunet_core.training import cost
from maskunet_core.training.base import BaseModel, OutOfMemory, load_for_training
from maskunet_core.training.batches import Batch
from maskunet_core.training.method import MaskCounts
from maskunet_core.training.optimisers import build_optimiser
from maskunet_core.training.seeds import seeded
from tests.builders import write_tiny_checkpoint
from trainer.base import load_base, load_toy_base
from trainer.config import Base
from trainer.config_file import parse_config
from trainer.host import PROJECT, enter_host
from trainer.loop import Run
from trainer.tables import machine
from trainer.toy.data import latent_set
from trainer.train import check, load_data, make_accelerator, start

MB = 2**20


@pytest.fixture
def base():
    return load_toy_base()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny.safetensors")


def config_of(folder, **changes):
    values = {
        "output": str(folder / "run"),
        "data": {"pictures": 48},
        "loop": {"steps": 4, "batch": 8, "precision": "fp32"},
        "validation": {"pictures": 0, "every": 0},
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value}
    return parse_config(values)


def make_run(config, base) -> Run:
    return Run(config, base, load_data(config, base), make_accelerator(config))


# Which device ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sees", "told", "cpu", "expected"),
    [
        (False, "", False, True),
        # MPS, XPU or CUDA: the host chooses, as it does for the nodes.
        (True, "", False, False),
        (True, "true", False, True),
        (True, "", True, True),
    ],
)
def test_the_host_chooses_the_device(monkeypatch, sees, told, cpu, expected):
    from comfy.cli_args import args

    monkeypatch.setattr(args, "cpu", False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: sees)
    monkeypatch.setenv("ACCELERATE_USE_CPU", told)
    enter_host(cpu=cpu)
    assert args.cpu is expected


def test_accelerate_and_the_host_on_two_devices_get_a_sentence(monkeypatch, tmp_path):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("xpu"))
    with pytest.raises(MaskUNetError, match="ComfyUI computes on xpu here, but accelerate on cpu"):
        make_accelerator(config_of(tmp_path))


def test_an_optimiser_without_fused_kernels_on_a_device_goes_without():
    class Elsewhere(torch.optim.AdamW):
        def __init__(self, *arguments, fused, **options):
            if fused:
                raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of a device.")
            super().__init__(*arguments, fused=fused, **options)

    sys.modules[__name__].Elsewhere = Elsewhere
    groups = [{"params": [nn.Parameter(torch.ones(2))]}]
    assert isinstance(build_optimiser(groups, f"{__name__}.Elsewhere", {"lr": 0.1, "fused": True}), Elsewhere)


def test_the_toy_world_is_encoded_where_and_as_the_host_holds_its_models(base):
    autoencoder = base.vae.first_stage_model
    expected = latent_set(4, seeded(1), autoencoder).latents
    found = latent_set(4, seeded(1), autoencoder.to(torch.bfloat16)).latents
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


def test_prompts_are_encoded_where_the_text_encoder_lies(base):
    class Elsewhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, device="meta"))

        def forward(self, tokens):
            assert tokens.device.type == "meta"
            return (torch.zeros(len(tokens), 16, 128),)

    base.clip.cond_stage_model.clip_l.transformer = Elsewhere()
    assert base.encode_tokens(torch.ones(2, 16, dtype=torch.long)).device.type == "cpu"


# Attention ------------------------------------------------------------------------------------------------------


def test_an_attention_without_a_backward_pass_is_not_trained_through(base, tmp_path, monkeypatch):
    """As flash and sage attention: where gradients pass them, they are lost or refused."""
    from comfy.ldm.modules import attention

    @attention.wrap_attn
    def attention_flash(*arguments, **options):
        with torch.no_grad():
            return attention.attention_pytorch.__wrapped__(*arguments, **options)

    gradients = []
    for host in (attention.attention_pytorch, attention_flash):
        monkeypatch.setattr(attention, "optimized_attention", host)
        run = make_run(config_of(tmp_path), base)
        run._forward_backward(run.objective.batches.draw(0))
        gradients.append(torch.cat([p.grad.flatten() for p in run.module.parameters()]))
    torch.testing.assert_close(*gradients)
    assert "through attention_pytorch: attention_flash, which ComfyUI uses, has no backward pass" in attention_notice(
        run.device
    )


def test_the_hosts_own_attention_is_not_worth_a_word(base, monkeypatch):
    from comfy.ldm.modules import attention

    monkeypatch.setattr(attention, "optimized_attention", attention.attention_sub_quad)
    assert attention_notice(torch.device("cpu")) == ""


@pytest.mark.parametrize("tokens", [256, 1024])
def test_attention_in_slices_has_the_gradients_of_the_whole(monkeypatch, tokens):
    """Where the host does without PyTorch's attention: MPS, some AMD cards."""
    from comfy.ldm.modules import attention

    inputs = [torch.randn(2, tokens, 64, generator=seeded(n)).requires_grad_() for n in range(3)]
    found = []
    for chosen in (attention.attention_pytorch, attention.attention_sub_quad):
        monkeypatch.setattr("maskunet_core.seam.attention._chosen", lambda device, chosen=chosen: chosen)
        out = differentiable_attention(attention.attention_basic, *inputs, 4, attn_precision=torch.float32)
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for whole, sliced in zip(*found, strict=True):
        torch.testing.assert_close(sliced, whole, rtol=1e-4, atol=1e-5)


# How the base is loaded -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", ["toy", "tiny"])
def test_the_base_has_weights_of_its_own_where_the_hosts_default_is_to_lend_them(tiny, checkpoint, monkeypatch):
    import comfy.model_patcher as patchers

    class Lending(patchers.ModelPatcher):
        """ModelPatcherDynamic, which has no CPU."""

        def is_dynamic(self):
            return True

    monkeypatch.setattr(patchers, "CoreModelPatcher", Lending)
    base = load_base(Base(str(tiny)) if checkpoint == "tiny" else Base())
    assert load_for_training(base) == base.patcher.load_device
    assert not base.patcher.is_dynamic()
    assert base.patcher.loaded_size() == base.patcher.model_size()
    for parameter in base.unet.parameters():
        assert type(parameter) is nn.Parameter
        assert not parameter.is_inference()
        assert parameter.device == base.patcher.load_device


def test_the_toy_is_trained_in_fp32_where_the_host_would_take_half(monkeypatch):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "should_use_fp16", lambda *_, **__: True)
    assert {p.dtype for p in load_toy_base().unet.parameters()} == {torch.float32}


def test_importing_the_host_turns_no_weights_dynamic():
    """Whether weights are lent is the choice of ComfyUI's main.py, which the trainer never runs."""
    program = (
        "from trainer.host import enter_host; enter_host()\n"
        "import comfy.sd, comfy.model_patcher as patchers, comfy.memory_management as memory\n"
        "print(patchers.CoreModelPatcher is patchers.ModelPatcher, memory.aimdo_enabled)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True)
    assert result.stdout.split() == ["True", "False"], result.stderr


def test_a_base_that_is_loaded_in_part_gets_a_sentence(base, streamed_in):
    with streamed_in(), pytest.raises(OutOfMemory, match="The U-Net of toy is on cpu only in part"):
        load_for_training(base)


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_base_that_does_not_fit_gets_a_sentence(base, monkeypatch):
    import comfy.model_management

    comfy.model_management.unload_all_models()
    monkeypatch.setattr("comfy.model_patcher.ModelPatcher.load", out_of_memory)
    with pytest.raises(
        OutOfMemory, match=r"^The U-Net of toy does not fit into the memory of cpu: close other programs"
    ):
        load_for_training(base)


def test_other_models_leave_the_device_before_training(base):
    import comfy.model_management

    base.encode_text("a red circle")
    base.encode_picture(torch.rand(3, 64, 64))
    load_for_training(base)
    assert [loaded.model for loaded in comfy.model_management.current_loaded_models] == [base.patcher]


# Memory ---------------------------------------------------------------------------------------------------------


def test_a_step_that_does_not_fit_gets_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(BaseModel, "diffusion_loss", out_of_memory)
    told = r"^A step of 4 pictures does not fit into the memory of cpu: raise loop.accumulate, set loop.checkpointing"
    with pytest.raises(OutOfMemory, match=told):
        start(config_of(tmp_path, loop={"accumulate": 2}))


def test_other_errors_of_a_step_stay_what_they_are(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(BaseModel, "diffusion_loss", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        start(config_of(tmp_path))


def test_check_says_which_batch_does_not_fit(tmp_path, monkeypatch):
    whole = BaseModel.diffusion_loss

    def small_device(self, clean, *arguments):
        return whole(self, clean, *arguments) if len(clean) < 4 else out_of_memory()

    monkeypatch.setattr(BaseModel, "diffusion_loss", small_device)
    told = "\n".join(check(config_of(tmp_path)))
    assert "Warning: 4 pictures at once do not fit into the memory of cpu" in told
    assert re.search(r"Estimated peak memory: [\d,]+ MB, on cpu\.", told)
    told = "\n".join(check(config_of(tmp_path, loop={"accumulate": 4})))
    assert "do not fit" not in told


def test_check_says_when_not_even_one_picture_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(BaseModel, "diffusion_loss", out_of_memory)
    with pytest.raises(OutOfMemory, match="A step of one picture of 64x64 does not fit into the memory of cpu"):
        check(config_of(tmp_path))


def test_check_does_not_try_what_cannot_fit(tmp_path, monkeypatch):
    """On a CPU nothing is caught: the system ends the program."""
    tried = []

    def one_pass(base, method, accelerator, device, count, size):
        tried.append(count)
        return 100 * MB * count + 900 * MB, 1.0 * count, 0.5 * count

    monkeypatch.setattr(cost, "_pass", one_pass)
    monkeypatch.setattr(cost.PeakMemory, "now", 900 * MB, raising=False)
    monkeypatch.setattr(cost, "total_memory", lambda device: 1300 * MB)
    told = "\n".join(check(config_of(tmp_path)))
    assert tried == [1, 1]
    assert "Warning: 8 pictures at once do not fit" in told
    estimated = float(re.search(r"peak memory: ([\d,]+) MB", told)[1].replace(",", ""))
    assert estimated == pytest.approx(1700, abs=20)


# Waiting for the device -----------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts the values that are read, each of which would wait for a device."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))


def test_a_step_waits_no_oftener_for_having_more_parts(base, tmp_path):
    counts = []
    for accumulate in (1, 8):
        run = make_run(config_of(tmp_path, loop={"accumulate": accumulate}), base)
        with Reads() as reads:
            run.train_step()
        counts.append(reads.count)
    assert counts[0] == counts[1]


def test_statistics_wait_for_nothing_until_they_are_asked():
    statistics = MaskCounts()
    with Reads() as reads:
        for layer in range(10):
            statistics(str(layer), torch.ones(2, 3, 3))
    assert reads.count == 0
    assert statistics.keep_ratio == 1.0


def test_batches_are_read_ahead_each_once_and_in_order(base, tmp_path, monkeypatch):
    run = make_run(config_of(tmp_path), base)
    drawn, draw = [], run.objective.batches.draw

    def noted(step, *part):
        drawn.append((step, run.step))
        return draw(step, *part)

    monkeypatch.setattr(run.objective.batches, "draw", noted)
    for _ in range(4):
        run.train_step()
    # (of step, while in step): none beyond the last.
    assert drawn == [(0, 0), (1, 0), (2, 1), (3, 2)]
    drawn.clear()
    run.step = 2
    run.train_step()
    assert drawn == [(2, 2), (3, 2)]


def test_batches_go_to_a_gpu_from_pinned_memory(base, tmp_path, monkeypatch):
    run = make_run(config_of(tmp_path), base)
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.shape) or self.clone())
    on_cpu = run._batch(0)
    assert not pinned
    run.device = torch.device("cuda")
    batch = run._batch(0)
    assert len(pinned) == 5
    assert isinstance(batch, Batch)
    assert torch.equal(batch.noise, on_cpu.noise)
    assert torch.equal(batch.conditions["cross_attn"], on_cpu.conditions["cross_attn"])


def test_tables_name_the_device_that_was_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "an idle GPU")
    assert machine()["device"] == platform.machine()
