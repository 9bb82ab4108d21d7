"""Judging methods beside the base on the toy world."""

import pytest

from trainer.benchmark.methods import BadMethod, parse_methods
from trainer.evaluate import Protocol, evaluate

FEW = Protocol(loss_pictures=64, prompts=2, pictures=4, steps=3)


def test_each_method_is_judged_as_if_it_were_alone(files_of_methods, tmp_path):
    """Nothing of one is left where the next, or the base, is judged."""
    files = {"generator": "g", "lora": "lora", "full": "full"}
    names = [f"{kind}:{files_of_methods / file}.safetensors" for kind, file in files.items()]
    together = evaluate(parse_methods(names), FEW, tmp_path)
    assert len({row["loss"] for row in together}) == 4
    assert len({row["frechet"] for row in together}) == 4
    for row, name in zip(together[1:], names, strict=True):
        assert evaluate(parse_methods([name]), FEW, tmp_path) == [together[0], row]


def test_several_parts_act_together(files_of_methods, tmp_path):
    parts = [f"generator:{files_of_methods / 'g.safetensors'}", f"lora:{files_of_methods / 'lora.safetensors'}"]
    rows = evaluate(parse_methods([*parts, "+".join(parts)]), FEW, tmp_path)
    assert len({row["loss"] for row in rows}) == 4


def test_what_has_no_held_out_loss_is_refused(files_of_methods, tmp_path):
    for name in ("search:fast", f"masks:{files_of_methods / 'm.safetensors'}"):
        with pytest.raises(BadMethod, match="has no held-out loss: judge it by `benchmark`"):
            evaluate(parse_methods([name]), FEW, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_lora_with_a_text_encoder_is_refused(files_of_methods, tmp_path, monkeypatch):
    from trainer.benchmark import methods

    with_lora = methods.with_lora

    def with_text(patcher, clip, file, strength):
        patcher, clip = with_lora(patcher, clip, file, strength)
        clip = clip.clone()
        clip.patcher.patches = {"a text encoder's": []}
        return patcher, clip

    monkeypatch.setattr(methods, "with_lora", with_text)
    with pytest.raises(BadMethod, match="changes more than a call"):
        evaluate(parse_methods([f"lora:{files_of_methods / 'lora.safetensors'}"]), FEW, tmp_path)
