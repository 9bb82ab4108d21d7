"""Small runs that learn a word, and what their tests share."""

from trainer.config_file import parse_config
from trainer.embedding.toy import DIAGONAL
from trainer.loop import Run
from trainer.train import load_data, make_accelerator


def values_of(tmp_path, **changes) -> dict:
    values = {
        "output": str(tmp_path / "mystar"),
        "method": "embedding",
        "data": {"pictures": 10, "cache": str(tmp_path / "cache")},
        "embedding": {"start": "a", "lr": 2e-2},
        "loop": {"steps": 6, "batch": 4, "precision": "fp32", "schedule": "constant", "warm_up": 0},
        "validation": {"every": 0},
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return values


def config_of(tmp_path, **changes):
    return parse_config(values_of(tmp_path, **changes))


RELATION = {"embedding": {"kind": "relation", "toy": DIAGONAL, "start": "and", "lr": 2e-2}}


def make_run(config, base) -> Run:
    return Run(config, base, load_data(config, base), make_accelerator(config))
