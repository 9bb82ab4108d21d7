"""A word of learned vectors: how it stands in prompts, how it is encoded with gradients, and its file."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from maskunet_core.errors import MaskUNetError
from maskunet_core.replacing import replacing
from maskunet_core.seam.shadow import Shadowed
from maskunet_core.training.base import BaseModel, UnfitEmbedding

from ..summary import told_training

MARK = "{}"
"""Stands for the learned word in every text that a run reads."""
LETTERS = "lgh"
"""The host's names of CLIP's text encoders, in the order in which SDXL joins them; the last has the pooled output."""


class BadText(MaskUNetError):
    """A text from which nothing can be learned, or that nothing can begin with."""


@dataclass(frozen=True)
class Encoder:
    """A text encoder of a base. letter: the host's name of its tokens; tokenizer, model: the host's."""

    letter: str
    tokenizer: Any
    model: nn.Module

    @property
    def key(self) -> str:
        """In embedding files: `clip_l`, `clip_g` or `clip_h`."""
        return self.tokenizer.embedding_key

    @property
    def table(self) -> Tensor:
        """[V, width]: the vectors of its tokens."""
        return self.model.transformer.get_input_embeddings().weight

    @property
    def special_ids(self) -> tuple[int, int, int]:
        """Begin, end and padding."""
        return self.tokenizer.start_token, self.tokenizer.end_token, self.tokenizer.pad_token

    def inner(self, tokens: list[Any]) -> list[Any]:
        """A chunk of ids and vectors without begin, end and padding."""
        _, end, _ = self.special_ids
        return list(itertools.takewhile(lambda token: torch.is_tensor(token) or token != end, tokens[1:]))


def text_encoders(clip: Any) -> list[Encoder]:
    names = [letter for letter in LETTERS if hasattr(clip.cond_stage_model, f"clip_{letter}")]
    parts = clip.tokenizer, clip.cond_stage_model
    return [Encoder(letter, *(getattr(part, f"clip_{letter}") for part in parts)) for letter in names]


def differentiable(encoders: list[Encoder]) -> Shadowed:
    """Gradients pass the text encoders inside the block. The host adds to a layer's input in place, which its norm has
    kept for the backward pass: here the norm keeps a copy."""

    def forward_of(norm: nn.Module):
        compute = norm.forward
        return lambda x: compute(x.clone())

    modules = (pair for encoder in encoders for pair in encoder.model.named_modules())
    norms = (module for name, module in modules if name.rpartition(".")[2] in ("layer_norm1", "layer_norm2"))
    return Shadowed((norm, {"forward": forward_of(norm)}) for norm in norms)


class LearnedWord(nn.Module):
    """Vectors [v, width] for each text encoder of a base, by its key; trained, in fp32.

    name: in prompts `embedding:name`. start: the text whose tokens' vectors it begins with, which may itself hold an
    `embedding:`. count: of the vectors, for which the start's are repeated; 0 for as many as it has tokens. Raises
    BadText.
    """

    def __init__(self, base: BaseModel, name: str, start: str, count: int = 0):
        super().__init__()
        self.base, self.name = base, name
        self.encoders = text_encoders(base.clip)
        rows = self._rows_of(start)
        tokens = len(next(iter(rows.values())))
        if count and count < tokens:
            raise BadText(
                f"embedding.start: '{start}' has {tokens} tokens, more than embedding.vectors ({count}): raise "
                "that, or name a shorter start."
            )
        self.count = count or tokens
        repeated = {key: found[torch.arange(self.count) % tokens] for key, found in rows.items()}
        self.vectors = nn.ParameterDict({key: nn.Parameter(found) for key, found in repeated.items()})
        self.start = {key: found.clone() for key, found in repeated.items()}
        self._differentiable = differentiable(self.encoders)

    @torch.no_grad()
    def _rows_of(self, text: str) -> dict[str, Tensor]:
        """[n, width] fp32, by encoder: the vectors of a text's tokens."""
        chunks, rows = self.base.tokens(text), {}
        for encoder in self.encoders:
            tokens = encoder.inner([token for token, _ in chunks[encoder.letter][0]])
            if not tokens:
                raise BadText(f"embedding.start: the text encoder knows no word of '{text}': name another one.")
            found = [token if torch.is_tensor(token) else encoder.table[token] for token in tokens]
            rows[encoder.key] = torch.stack([row.detach().float().cpu() for row in found])
        return rows

    def inner_ids(self, text: str) -> dict[str, list[int]]:
        """Of a text without embeddings, without begin, end and padding, by encoder."""
        chunks = self.base.tokens(text)
        return {e.key: e.inner([token for token, _ in chunks[e.letter][0]]) for e in self.encoders}

    # Texts ------------------------------------------------------------------------------------------------------

    def prompt(self, text: str) -> str:
        """A text as the host's prompts spell it. The host finds an embedding between spaces alone."""
        return text.replace(MARK, f" embedding:{self.name} ")

    def known(self) -> Shadowed:
        """The host's prompts find these vectors under the word's name inside the block."""
        from comfy import sd1_clip

        stock = sd1_clip.load_embed

        def load_embed(name: str, folders: Any, size: int, key: str = "") -> Tensor | None:
            return self.vectors[key] if name == self.name else stock(name, folders, size, key)

        return Shadowed([(sd1_clip, {"load_embed": load_embed})])

    def held_at(self, values: dict[str, Tensor]) -> Shadowed:
        """The word has other vectors inside the block, by key as `vectors`."""
        moved = {key: value.to(self.vectors[key].device) for key, value in values.items()}
        return Shadowed([(self, {"vectors": moved})])

    def ids(self, text: str) -> dict[str, Tensor]:
        """[T] token ids of the first chunk of a text, by encoder; -1 - k stands for vector k. Weights in the text are
        left out: the host applies them in place. Raises BadText where the vectors do not all find room."""
        with self.known():
            chunks = self.base.tokens(self.prompt(text))
        found = {}
        for encoder in self.encoders:
            tokens = [token for token, _ in chunks[encoder.letter][0]]
            if sum(map(torch.is_tensor, tokens)) != self.count * text.count(MARK):
                raise BadText(
                    f"The text '{text}' cannot be learned from: it needs room for the {self.count} vectors of {MARK} "
                    f"within {encoder.tokenizer.max_length - 2} tokens, and no other embedding. Shorten it."
                )
            turn = itertools.count()
            ids = [-1 - next(turn) % self.count if torch.is_tensor(token) else token for token in tokens]
            found[encoder.key] = torch.tensor(ids)
        return found

    def encode(self, ids: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the U-Net takes, each [B, ...], on its device and differentiable in the vectors.

        ids: [B, T] by encoder, see `ids`. The text encoders must be loaded.
        """
        device = self.base.clip.patcher.load_device
        stage, contexts, pooled = self.base.clip.cond_stage_model, [], None
        stage.reset_clip_options()
        stage.set_clip_options({"execution_device": device})
        with self._differentiable:
            for encoder in self.encoders:
                vectors = self.vectors[encoder.key]
                rows = [[vectors[-1 - i] if i < 0 else i for i in row] for row in ids[encoder.key].tolist()]
                context, pooled = encoder.model(rows)[:2]
                contexts.append(context)
        conditions = {"cross_attn": torch.cat(contexts, -1)}
        if self.base.model.adm_channels:
            conditions["pooled_output"] = pooled
        return {key: value.to(self.base.patcher.load_device) for key, value in conditions.items()}

    # What it has become -----------------------------------------------------------------------------------------

    def told(self) -> dict[str, float]:
        """Mean length of the vectors over that of the start's, and mean cosine to them."""
        with torch.no_grad():
            pairs = [(now.detach().cpu(), self.start[key]) for key, now in self.vectors.items()]
            lengths = torch.cat([now.norm(dim=-1) / start.norm(dim=-1).clamp_min(1e-8) for now, start in pairs])
            cosines = torch.cat([torch.cosine_similarity(now, start, dim=-1) for now, start in pairs])
        return {"length": lengths.mean().item(), "cosine": cosines.mean().item()}

    @torch.no_grad()
    def nearest(self, count: int = 3) -> list[list[str]]:
        """For each vector the tokens of the first encoder whose own vectors have the largest cosine to it."""
        encoder = self.encoders[0]
        now = torch.nn.functional.normalize(self.vectors[encoder.key].detach().cpu(), dim=-1)
        table = torch.nn.functional.normalize(encoder.table.detach().float().cpu(), dim=-1)
        best = (now @ table.T).topk(count).indices.tolist()
        return [
            [str(encoder.tokenizer.inv_vocab.get(index, index)).removesuffix("</w>") for index in row] for row in best
        ]

    def save(self, path: Path, record: dict[str, Any]) -> None:
        """The file that `embedding:name` reads: one tensor under the word's name, or one for each encoder of SDXL."""
        tensors = {key: value.detach().cpu().float().contiguous() for key, value in self.vectors.items()}
        if len(tensors) == 1:
            tensors = {self.name: next(iter(tensors.values()))}
        record = record | {"nearest": self.nearest()}
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"format": FORMAT, "training": json.dumps(record)})


FORMAT = "embedding"
"""In the metadata of files: what they are."""


def training_of(path: Path) -> dict[str, Any] | None:
    """The record in a file of `LearnedWord.save`; None for another file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return json.loads(metadata["training"]) if metadata.get("format") == FORMAT else None


def word_of(path: Path, base: BaseModel) -> LearnedWord:
    """The word of a file for which `training_of` finds a record. Raises UnfitEmbedding for another base's."""
    word = LearnedWord(base, path.stem, training_of(path)["config"]["embedding"]["start"])
    tensors = load_file(path)
    for key, start in word.start.items():
        vectors = tensors[key] if key in tensors else next(iter(tensors.values()))
        if vectors.shape[1] != start.shape[1]:
            raise UnfitEmbedding(
                f"'{path}' has vectors of {vectors.shape[1]} numbers where the text encoder of {base.name} takes "
                f"{start.shape[1]}: it was made for another model. Name that by --base."
            )
        word.vectors[key] = nn.Parameter(vectors)
    return word


def word_summary(path: Path) -> list[str] | None:
    """What a file of `LearnedWord.save` is, in a few lines; None for another file."""
    training = training_of(path)
    if training is None:
        return None
    shapes = {key: tuple(vectors.shape) for key, vectors in load_file(path).items()}
    sizes = " and ".join(f"{count} x {width} ({key})" for key, (count, width) in sorted(shapes.items()))
    near = "; ".join(", ".join(tokens) for tokens in training.get("nearest", []))
    return [
        f"{path.name}: a learned word, vectors of {sizes}. Nearest tokens: {near}.",
        f"In ComfyUI's models/embeddings, prompts name it embedding:{path.stem}.",
        *told_training(training),
    ]
