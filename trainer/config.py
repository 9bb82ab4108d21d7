"""The configuration of a training run. `config_file` reads and checks it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskunet_core.training.settings import Generator, Loop, Optimiser, Validation, plain_values

from .choices import PARTS, TOY


@dataclass(frozen=True)
class Base:
    """The frozen model.

    checkpoint: a checkpoint file (SD 1.5, SD 2.x, SDXL, or a transformer), as a path or as ComfyUI's folders of
    checkpoints name it, or "toy", the embedded model. diffusion_model, text_encoders, vae: separate files instead, as
    ComfyUI's folders of these names hold them; text_encoder_type: as its Load CLIP calls it (`flux`, `lumina2`,
    `qwen_image`, ...). body: the toy's `unet` or its `transformer`. weights: folder of other toy weights, "" for the
    shipped ones. lora: files that are merged into the base, named as checkpoints are, with their strengths.
    """

    checkpoint: str = TOY
    diffusion_model: str = ""
    text_encoders: tuple[str, ...] = ()
    text_encoder_type: str = "stable_diffusion"
    vae: str = ""
    body: str = "unet"
    weights: str = ""
    lora: dict[str, float] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Names of separate files by the keys of PARTS; none for a checkpoint or the toy."""
        names = (self.diffusion_model and (self.diffusion_model,), self.text_encoders, self.vae and (self.vae,))
        return {key: tuple(of_key) for key, of_key in zip(PARTS, names)} if any(names) else {}

    @property
    def is_toy(self) -> bool:
        return self.checkpoint == TOY and not self.parts

    @property
    def named(self) -> str:
        """What stands for the whole."""
        return self.diffusion_model or self.checkpoint


@dataclass(frozen=True)
class Data:
    """What is trained on.

    path: a folder of pictures with captions, a data set on disk, parquet files or webdataset shards, or an address of
    one that `fsspec` opens (`s3://`, `hf://`); "" renders the toy world (`pictures` of them, a share of `caption_noise`
    with wrong captions). caption_column: where captions are, "" looks for the usual names. resolution: side of a square
    of the pictures' area in pixels, 64 for the toy model where nothing is said; buckets: keep aspect ratios. flip:
    mirror half of the pictures. caption_dropout: share of empty captions, which CFG needs. cache: folder for latents
    and text embeddings. broken_limit: share of unreadable pictures that stops a run.
    """

    path: str = ""
    caption_column: str = ""
    resolution: int = 512
    buckets: bool = True
    flip: bool = True
    caption_dropout: float = 0.1
    cache: str = "output/cache"
    broken_limit: float = 0.02
    pictures: int = 20_000
    caption_noise: float = 0.0


@dataclass(frozen=True)
class Reward:
    """What `objective = "reward"` trains by: prompts alone, pictures that the run draws itself, and what rewards say of
    them (Diffusion-NFT, Zheng et al., arXiv 2509.16117). The loop's steps come in rounds: a round draws pictures, and
    its steps learn from them.

    prompts: a text file with a prompt in each line; "" takes the captions of `data.path`, or, for the toy model, those
    of the toy world. models: rewards with their weights, named as files in ComfyUI's `models/reward` or as paths;
    "toy" reads the toy world. prompts_per_round, pictures_per_prompt: what a round draws; passes: how often a
    picture of it is learnt from. steps, cfg, sampler, scheduler: how it draws, and how the result is meant to be used;
    a cfg of 1 is without guidance, at half the price. beta: how far the two policies that are compared, better and
    worse, lie apart. follow: how far the policy that draws moves to the trained one after a round. pull: weight of the
    squared distance of what the model predicts to what the base does.
    """

    prompts: str = ""
    models: dict[str, float] = field(default_factory=lambda: {TOY: 1.0})
    prompts_per_round: int = 8
    pictures_per_prompt: int = 8
    passes: int = 2
    steps: int = 8
    cfg: float = 1.0
    sampler: str = "euler"
    scheduler: str = "normal"
    beta: float = 1.0
    follow: float = 0.7
    pull: float = 0.0

    @property
    def pictures(self) -> int:
        """Of a round."""
        return self.prompts_per_round * self.pictures_per_prompt


@dataclass(frozen=True)
class Prior:
    """DreamBooth's prior preservation (Ruiz et al., arXiv 2208.12242): what the base draws of a class, it shall go on
    to draw.

    prompt: of the class, "" for none of this. pictures: how many of them the frozen base draws, with `steps` steps and
    `cfg`, in the sizes of the pictures trained on; folder: where they are kept, below a name of all that they depend
    on. share: of each batch that is class pictures, at least one and not all. weight: of their mean loss, which is
    added to that of the others.
    """

    prompt: str = ""
    pictures: int = 200
    folder: str = "output/prior"
    weight: float = 1.0
    share: float = 0.5
    steps: int = 25
    cfg: float = 7.5


@dataclass(frozen=True)
class Lora:
    """The baseline `method = "lora"`. alpha: scale times rank, as LoRA files hold it."""

    rank: int = 8
    alpha: float = 8.0


@dataclass(frozen=True)
class Relation:
    """What learning a relation takes besides (ReVersion, Huang et al., arXiv 2303.13495).

    alpha: how much likelier late timesteps are than early ones, up to 1; 0 for all alike. weight: of the steering loss,
    which draws the vectors to words that name relations and away from those of the texts; 0 for none. positives: such
    words per picture; temperature: of their comparison. words: a text file with a word in each line, "" for a list of
    English prepositions.
    """

    alpha: float = 0.5
    weight: float = 0.01
    positives: int = 4
    temperature: float = 0.07
    words: str = ""


@dataclass(frozen=True)
class Embedding:
    """What `method = "embedding"` learns: vectors that stand for a word in prompts (Textual Inversion, Gal et al.,
    arXiv 2208.01618), alone or, as in "embedding+maskunet", together with another method.

    kind: an `object`, a `style`, or a `relation` of two things. Pictures need no captions: texts with `{}` for the word
    come from lists for objects and styles, or from the text file `texts`, a text in each line. A picture's own texts
    come first: lines of NAME.txt beside it, or of the folder's `text.json` ({"NAME.jpg": ["a cat {} a stone"]}).
    start: words whose vectors it begins with, or `embedding:NAME`. vectors: how many, 0 for as many as the start has
    tokens. lr: of the vectors. generator: a file of MaskUNet Loader that acts while the word is learned and is not
    trained itself. toy: for the toy model without a `data.path`, what is rendered: pictures of a word of its
    vocabulary, which the captions then lack, or "diagonal", a relation that it has no word for.
    """

    kind: str = "object"
    start: str = ""
    vectors: int = 0
    texts: str = ""
    lr: float = 5e-3
    generator: str = ""
    toy: str = "star"
    relation: Relation = field(default_factory=Relation)


@dataclass(frozen=True)
class Config:
    """A run. output: its folder; the file for the nodes is `<output>/<name of the folder>.safetensors`.

    objective: `diffusion` learns from pictures with captions (Eq. 2), `reward` from prompts and rewards. targets: name
    of the set of layers, for every method.
    """

    output: str = "output/train/run"
    objective: str = "diffusion"
    method: str = "maskunet"
    targets: str = "decoder attention"
    seed: int = 0
    base: Base = field(default_factory=Base)
    data: Data = field(default_factory=Data)
    prior: Prior = field(default_factory=Prior)
    reward: Reward = field(default_factory=Reward)
    generator: Generator = field(default_factory=Generator)
    lora: Lora = field(default_factory=Lora)
    embedding: Embedding = field(default_factory=Embedding)
    optimiser: Optimiser = field(default_factory=Optimiser)
    loop: Loop = field(default_factory=Loop)
    validation: Validation = field(default_factory=Validation)

    @property
    def is_toy(self) -> bool:
        return self.base.is_toy

    @property
    def learns_word(self) -> bool:
        return self.method.startswith("embedding")

    @property
    def of_weights(self) -> str:
        """The method that changes the U-Net, or nothing."""
        return self.method.removeprefix("embedding").removeprefix("+")

    @property
    def mirrors(self) -> bool:
        """Whether pictures are mirrored: relations and what the toy world renders have a left and a right."""
        asymmetric = self.learns_word and (self.embedding.kind == "relation" or not self.data.path)
        return self.data.flip and not asymmetric

    @property
    def result(self) -> Path:
        """The file that the run makes."""
        folder = Path(self.output)
        return folder / f"{folder.name}.safetensors"

    @property
    def results(self) -> list[Path]:
        """That file, and that of the method beside a learned word."""
        beside = self.learns_word and self.of_weights
        own = self.result
        return [own, own.with_name(f"{own.stem}_{self.of_weights}{own.suffix}")] if beside else [own]


def to_toml_values(config: Config) -> dict[str, Any]:
    """The inverse of `parse_config`."""
    return plain_values(config)
