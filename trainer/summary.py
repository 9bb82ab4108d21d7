"""What a generator file is, in a few lines."""

from typing import Any

from maskunet_core.training.validate import told_gain


def summary(description: dict[str, Any]) -> list[str]:
    """description: of `maskunet_core.files.checkpoint.describe`."""
    lines = [
        f"{description['file']}: a mask generator ({description['architecture']}) for {description['base model']}.",
        f"It masks {description['targets']}.",
    ]
    return lines + told_training(description["training"])


def told_training(training: dict[str, Any]) -> list[str]:
    """How a file was made. training: the record in its metadata."""
    lines = []
    config, best = training.get("config"), training.get("validation")
    if isinstance(config, dict):
        data = config.get("data", {}).get("path") or "the toy world"
        steps = config.get("loop", {}).get("steps")
        lines.append(
            f"Trained on {data}, base {training.get('base')}: the state after step {training.get('step')} of {steps}, "
            f"{training.get('seconds')} s."
        )
        lines.append(told_gain(best))
    elif "converted_from" in training:
        lines.append(f"Converted from {' and '.join(map(str, training['converted_from']))}.")
    return lines
