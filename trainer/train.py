"""Starts and resumes training runs: configuration, base, data, loop."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from maskunet_core.errors import MaskUNetError
from maskunet_core.models.families.unet import UNET
from maskunet_core.seam.attention import attention_notice
from maskunet_core.training.base import BaseModel, fitting
from maskunet_core.training.run import held_out_count
from maskunet_core.training.seeds import seeded

from .base import load_base, require_trainable
from .config import Config
from .config_checks import for_unets_alone, warnings
from .config_file import BadConfig
from .data.share import ALONE, Share
from .host import MissingPackage, cpu_has_bf16
from .loop import Run
from .run_folder import claimed, clear, earlier_run, occupied, read_state, reopened, require_same, stopped, write_config

LESS_MEMORY = "raise loop.accumulate, set loop.checkpointing to true, or lower data.resolution"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_accelerator(config: Config):
    """Mixed precision and processes by `accelerate`, on the host's device. Raises MissingPackage."""
    import comfy.model_management

    try:
        from accelerate import Accelerator
    except ImportError:
        raise MissingPackage(
            "The trainer needs the package accelerate. Install what it needs by `pip install accelerate datasets "
            "tensorboard` in the environment that ComfyUI runs in."
        ) from None
    on_cpu = comfy.model_management.get_torch_device().type == "cpu"
    emulated = on_cpu and config.loop.precision == "bf16" and not cpu_has_bf16()
    precision = "no" if emulated or config.loop.precision == "fp32" else config.loop.precision
    accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu)
    if emulated:
        accelerator.print("This CPU does not compute in bf16: it trains in fp32, which is much faster here.")
    # The processes of accelerate have a device each, which is the host's from now on.
    device = comfy.model_management.get_torch_device()
    if device.type != accelerator.device.type:
        raise MaskUNetError(
            f"ComfyUI computes on {device} here, but accelerate on {accelerator.device}. Set ACCELERATE_USE_CPU=1 to "
            "train on the CPU, or install a version of accelerate that knows the device."
        )
    parts = accelerator.num_processes * config.loop.accumulate
    if config.loop.batch % parts:
        raise MaskUNetError(
            f"loop.batch is {config.loop.batch}, which {accelerator.num_processes} processes with "
            f"{config.loop.accumulate} parts each cannot share. Make it a multiple of {parts}."
        )
    return accelerator


def load_data(config: Config, base: BaseModel, share: Share = ALONE) -> Any:
    """Latents and conditioning of the configured data: the rendered toy world, or pictures through the cache, encoded
    by all processes; prompts where rewards are trained on."""
    if config.objective == "diffusion" and config.data.path and not config.learns_word:
        from .pictures import cached_pictures

        return cached_pictures(config, base, share)
    with share.in_turn():
        return _load_alone(config, base)


def _load_alone(config: Config, base: BaseModel) -> Any:
    """Data that each process makes for itself."""
    settings = config.data
    if config.objective == "reward":
        from .rewarded.prompts import load_prompts, tell

        prompts = load_prompts(config)
        tell(prompts, base)
        return prompts
    if config.learns_word:
        from .embedding.pictures import described_pictures

        return described_pictures(config, base)
    from .toy.data import ToyData, latent_set

    autoencoder = base.vae.first_stage_model
    found = latent_set(settings.pictures, seeded(21, config.seed), autoencoder, settings.caption_noise)
    return ToyData(found, base.encode_tokens)


def load_prior(config: Config, base: BaseModel, share: Share = ALONE) -> Any:
    """The pictures of `prior.prompt` as data, drawn where they are missing; None where no prior is configured."""
    if not config.prior.prompt:
        return None
    from .prior import prior_data

    with share.in_turn():
        return prior_data(config, base)


def check(config: Config) -> list[str]:
    """What the configuration will do, a sentence each; nothing is trained, and no picture is encoded."""
    from maskunet_core.training.cost import MB, total_memory

    from .cost import estimate
    from .methods import build_method

    accelerator = make_accelerator(config)
    told = [f"Warning: {sentence}" for sentence in warnings(config)]
    if sentence := earlier_run(config):
        told.append(f"Warning: {sentence}")
    size, pictures, records = (64, 64), config.data.pictures, []
    if config.objective == "reward":
        from .rewarded.drawing import picture_side
        from .rewarded.prompts import load_prompts

        size = (picture_side(config),) * 2
        prompts = load_prompts(config)
        told += prompts.notes
        training, held_out = prompts.split(config.validation.pictures, config.seed)
        data = f"{len(training):,} prompts, pictures of {size[0]}x{size[1]}; {len(held_out):,} more"
    else:
        if not config.is_toy or config.data.path or config.learns_word:
            from .pictures import picture_sizes, read_data

            found = read_data(config, sample=True)
            pictures, records = found.count, found.records
            told += found.notes
            size = max(picture_sizes(config), key=lambda pair: pair[0] * pair[1])
        data = f"{pictures:,} pictures, up to {size[0]}x{size[1]}, of which {held_out_count(config, pictures):,}"
    prior = []
    if config.prior.prompt:
        from .prior import plan

        prior = [plan(config)]
    base = load(config, accelerator)
    device = base.patcher.load_device
    if config.objective == "reward":
        from .rewarded.scorer import Scorer

        Scorer(config.reward.models, device)  # Says what is wrong with a file.
    with fitting(f"A step of one picture of {size[0]}x{size[1]}", device, LESS_MEMORY):
        method = build_method(base, config)
        cost = estimate(base, method, config, accelerator, size)
    if cost.too_many:
        told.append(
            f"Warning: {cost.too_many} pictures at once do not fit into the memory of {device} "
            f"({total_memory(device) / MB:,.0f} MB): {LESS_MEMORY}."
        )
    without = ", besides decoding and scoring pictures" if config.objective == "reward" else ""
    whole = cost.seconds * config.loop.steps / 3600
    return [
        *told,
        f"Base: {base.name}. Data: {data} are held out for validation. "
        f"Method: {config.method}, {cost.parameters:,} parameters.",
        *prior,
        *(
            f"Writes {file}, for ComfyUI's models/{folder}."
            for file, (folder, _) in method.files(config.result).items()
        ),
        f"Estimated peak memory: {cost.peak / MB:,.0f} MB, on {device}.",
        *_told_encoding(records, pictures, config, base, accelerator),
        f"Estimated time: {cost.seconds:.2f} s a step, {whole:.1f} h for {config.loop.steps:,} steps{without}.",
    ]


def _told_encoding(records: list[Any], pictures: int, config: Config, base: BaseModel, accelerator: Any) -> list[str]:
    """How long it takes to encode a data set, in a sentence. records: some of it; pictures: all of them."""
    from .data.decoding import BadPicture
    from .pictures import encoding_seconds

    if not records or config.learns_word:
        return []
    try:
        seconds = encoding_seconds(records, config, base)
    except BadPicture as error:
        return [f"Warning: {error}"]
    hours = pictures * seconds / accelerator.num_processes / 3600
    return [
        f"Encoding, of what the cache lacks: {seconds:.2f} s a picture, at most {hours:.1f} h for {pictures:,} in "
        f"{accelerator.num_processes} processes."
    ]


def load(config: Config, accelerator: Any) -> BaseModel:
    """The base of a configuration, its U-Net in half precision where a GPU trains in it. Raises BadBase, or BadConfig
    where a transformer cannot be trained so."""
    half = config.loop.precision != "fp32" and accelerator.device.type != "cpu"
    base = load_base(config.base, DTYPES[config.loop.precision] if half else torch.float32)
    require_trainable(base)
    if base.family is not UNET and (problems := for_unets_alone(config)):
        raise BadConfig("\n".join(problems))
    return base


def start(config: Config, *, overwrite: bool = False) -> Path:
    """Run the whole configuration; returns the path of the file that it made.

    overwrite: replace the run that `config.output` holds. Raises RunExists where it holds one otherwise, InUse where
    another process trains in it, and Stopped at Ctrl-C.
    """
    accelerator = make_accelerator(config)
    main = accelerator.is_main_process
    folder = Path(config.output)
    with claimed(config, overwrite) if main else contextlib.nullcontext(), _told_how_to_go_on(folder):
        base, data, prior = _loaded(config, accelerator)
        if main:
            clear(config)
        run = Run(config, base, data, accelerator, prior)
        if main:
            # What can be resumed from the first step on.
            run.save_state()
            write_config(config)
        return _finished(run, prior)


def resume(folder: Path) -> Path:
    """Go on with the run in `folder`, wherever it was begun. Raises CannotResume, InUse, and Stopped at Ctrl-C."""
    named, folder = folder, folder.absolute()
    with reopened(named) as config:
        accelerator = make_accelerator(config)
        main = accelerator.is_main_process
        with occupied(folder) if main else contextlib.nullcontext(), _told_how_to_go_on(folder):
            # Before the base is loaded: most of what speaks against it is known by then.
            require_same(read_state(folder)["config"], config, folder)
            base, data, prior = _loaded(config, accelerator)
            run = Run(config, base, data, accelerator, prior, folder)
            run.load_state()
            return _finished(run, prior)


@contextlib.contextmanager
def _told_how_to_go_on(folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise stopped(folder) from None


def _loaded(config: Config, accelerator: Any) -> tuple[BaseModel, Any, Any]:
    """Base, data and prior."""
    for sentence in warnings(config):
        accelerator.print(f"Warning: {sentence}")
    base = load(config, accelerator)
    share = Share.of(accelerator)
    return base, load_data(config, base, share), load_prior(config, base, share)


def _finished(run: Run, prior: Any) -> Path:
    """The run's file, after its last step."""
    config, accelerator = run.config, run.accelerator
    trained = sum(p.numel() for p in run.module.parameters())
    what = "prompts" if config.objective == "reward" else "pictures"
    pictures = f"{len(run.data):,} {what}, {_held_out(len(run.held_out), config)}"
    pictures += f", {len(prior):,} of the class" if prior else ""
    processes = f", in {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    accelerator.print(f"{config.method}: {trained:,} parameters, {pictures}, on {run.device}{processes}")
    if sentence := attention_notice(run.device):
        accelerator.print(sentence)
    with fitting(f"A step of {config.loop.batch // config.loop.accumulate} pictures", run.device, LESS_MEMORY):
        return run.run()


def _held_out(count: int, config: Config) -> str:
    """count: pictures that are held out."""
    asked = config.validation.pictures
    limit = "" if count >= asked else f": {asked:,}, but at most a fifth"
    return f"{count:,} more held out for validation (validation.pictures{limit})"
