"""What learned words gain on the toy model: a word that captions lack, and a relation that it has no word for."""

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskunet_core.replacing import replacing
from maskunet_core.toy.judge import read
from maskunet_core.toy.model import WEIGHTS, load_reader
from maskunet_core.training.seeds import seeded

from ..base import load_toy_base, sample_pictures
from ..config import Config
from ..config_file import parse_config
from ..loop import Run
from ..tables import write_table
from ..train import load_data, make_accelerator
from .toy import DIAGONAL, lesson, shows, text_of
from .word import MARK

SHIPPED = WEIGHTS.with_name("generators") / "toy_shapes.safetensors"
WORD = "star"
LONG = "three vectors, timesteps by importance, 8 times the steps"
_MORE_STEPS = {LONG: 8}
MASKS = {"method": "embedding+maskunet"}
PLAIN = {"embedding": {"relation": {"alpha": 0.0, "weight": 0.0}}}
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    WORD: {
        "embedding": {},
        "masks, start's vector": {**MASKS, "embedding": {"lr": 0.0}},
        "embedding + masks": MASKS,
        "embedding under the shipped generator": {"embedding": {"generator": str(SHIPPED)}},
    },
    DIAGONAL: {
        "embedding, plain loss": PLAIN,
        "+ timesteps by importance": {"embedding": {"relation": {"weight": 0.0}}},
        "+ steering": {"embedding": {"relation": {"alpha": 0.0}}},
        "+ both": {},
        "masks, start's vector": {**MASKS, "embedding": {"lr": 0.0}},
        "+ both, and masks": MASKS,
        LONG: {"embedding": {"start": "above left of", "lr": 1e-2, "relation": {"weight": 0.0}}},
    },
}
"""What is trained, by what is taught: changes of the configuration."""


@dataclass(frozen=True)
class Scale:
    """pictures: learned from; judged: drawn of each run, of captions that no training sees."""

    seeds: int = 2
    steps: int = 100
    pictures: int = 10
    judged: int = 60
    sampling_steps: int = 15

    @staticmethod
    def quick() -> "Scale":
        return Scale(seeds=1, steps=2, judged=4, sampling_steps=2)


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(values[key], new) for key, new in changes.items() if isinstance(values.get(key), dict)}
    return values | changes | both


def _config(taught: str, name: str, seed: int, scale: Scale, output: Path) -> Config:
    relation, steps = taught == DIAGONAL, scale.steps * _MORE_STEPS.get(name, 1)
    values = {
        "output": str(output / "word"),
        "method": "embedding",
        "seed": seed,
        "data": {"pictures": scale.pictures, "cache": str(output / "cache")},
        "embedding": {
            "kind": "relation" if relation else "object",
            "toy": taught,
            "start": "and" if relation else "a",
            "lr": 2e-2,
        },
        "optimiser": {"lr": 1e-3, "lr_bias": 1e-2},
        "generator": {"rank": 8, "width": 64, "start": 1.0},
        "loop": {"steps": steps, "batch": 8, "precision": "fp32", "schedule": "constant", "warm_up": 0},
        "validation": {"every": 0},
    }
    return parse_config(_merged(values, RUNS[taught][name]))


class Judge:
    """The share of right pictures of captions that no training sees, by the reader that no training asks."""

    def __init__(self, taught: str, scale: Scale, base: Any):
        self.taught, self.scale, self.base = taught, scale, base
        _, self.captions = lesson(taught, scale.judged, seeded(28, 0), held_out=True)
        self.reader = load_reader("reader_b")

    def of_words(self, word: str) -> Tensor:
        """`[N]`: of the base, with a word of its vocabulary in the place of what is learned."""
        return self._judged(self.base.patcher, [text_of(c, self.taught).replace(MARK, word) for c in self.captions])

    def of_run(self, run: Run) -> Tensor:
        """`[N]`, of the trained state."""

        def encode(texts: list[str]) -> Tensor:
            return torch.stack([self.base.encode_text(run.method.prompt(text))["cross_attn"] for text in texts])

        with run.method.sampling() as model:
            return self._judged(model, [text_of(caption, self.taught) for caption in self.captions], encode)

    def _judged(self, model: Any, texts: list[str], encode: Any = None) -> Tensor:
        pictures = sample_pictures(self.base, model, texts, 9, self.scale.sampling_steps, 5.0, encode=encode)
        return shows(read(self.reader, pictures), self.captions, self.taught).float()


class _StudyRun(Run):
    tensorboard = False


def _trained(config: Config, judge: Judge) -> Tensor:
    run = _StudyRun(config, judge.base, load_data(config, judge.base), make_accelerator(config))
    while run.step < config.loop.steps:
        run.train_step()
    return judge.of_run(run)


def _kept(path: Path, measure: Any) -> Tensor:
    """`[N]`, from the file where an earlier call left it."""
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(measure().tolist()), encoding="utf-8")
    return torch.tensor(json.loads(path.read_text(encoding="utf-8")))


def _row(taught: str, name: str, scores: list[Tensor], start: Tensor) -> dict[str, Any]:
    """scores: [N] of each seed; start: [N]. The error is that of the mean over prompts, each the mean over seeds."""
    of_prompts = torch.stack(scores).mean(0)
    gain = of_prompts - start
    right, change = (f"{v.mean():.3f} ± {v.std() / len(v) ** 0.5:.3f}" for v in (of_prompts, gain))
    by_seed = ", ".join(f"{score.mean():.2f}" for score in scores)
    return {"taught": taught, "run": name, "right": right, "paired with the start": change, "by seed": by_seed}


def _rows(taught: str, scale: Scale, base: Any, output: Path) -> list[dict[str, Any]]:
    judge, folder = Judge(taught, scale, base), output / taught
    start_word, *known = ("and", "left of", "above") if taught == DIAGONAL else ("a", taught)
    of_words = {word: _kept(folder / f"{word}.json", partial(judge.of_words, word)) for word in (start_word, *known)}
    start = of_words[start_word]
    rows = [_row(taught, f'base, "{word}"', [scores], start) for word, scores in of_words.items()]
    for name in RUNS[taught]:
        configs = [_config(taught, name, seed, scale, output) for seed in range(scale.seeds)]
        scores = [_kept(folder / f"{name} {c.seed}.json", partial(_trained, c, judge)) for c in configs]
        rows.append(_row(taught, name, scores, start))
    return rows


def word_compare(output: Path, scale: Scale) -> str:
    """Writes the table into `output`, and returns it. What an earlier call measured is not measured again."""
    base = load_toy_base()
    rows = [row for taught in RUNS for row in _rows(taught, scale, base, output)]
    return write_table(output, rows, dataclasses.asdict(scale))
