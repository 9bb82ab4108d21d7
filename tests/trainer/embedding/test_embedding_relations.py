"""What words of relations are trained by besides: steering, timesteps, positives and negatives."""

import pytest
import torch

from maskunet_core.toy.judge import read
from maskunet_core.toy.model import load_reader
from maskunet_core.toy.vocabulary import COLOURS, SHAPES, SIZES
from maskunet_core.training.seeds import seeded
from tests.trainer.embedding.learned_words import RELATION, config_of, make_run
from trainer.embedding.relation import Steering, importance, negative_ids, steering_loss
from trainer.embedding.texts import LISTS, lines_of
from trainer.embedding.toy import DIAGONAL, lesson, shows, text_of
from trainer.toy.world import render


@pytest.mark.parametrize(("case", "temperature"), [("one", 0.07), ("batch", 0.07), ("warm", 0.5)])
def test_the_steering_loss_is_the_originals(golden, case, temperature):
    table = golden["relation/table"].clone()
    placeholder, begin, end = 119, 117, 118
    vector = table[placeholder][None].clone().requires_grad_()
    ids = golden[f"relation/{case}/input_ids"].long()
    ids[ids == placeholder] = -1
    near = golden[f"relation/{case}/positive_ids"].long()
    near = near[(near != begin) & (near != end)]
    far = negative_ids(ids, torch.tensor([*range(40), begin, end]))
    loss = steering_loss(vector, table[near], table[far], temperature)
    loss.backward()
    torch.testing.assert_close(loss.detach()[None], golden[f"relation/{case}/loss"], rtol=1e-5, atol=0)
    expected = golden[f"relation/{case}/grad_placeholder"]
    assert (vector.grad[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_timesteps_are_drawn_by_the_originals_importance(golden):
    torch.testing.assert_close(importance(1000, 0.5), golden["relation/importance_p"], rtol=1e-6, atol=0)
    assert torch.equal(importance(1000, 0.0), torch.full((1000,), 1e-3))


def test_positives_are_words_of_relations_and_negatives_describe_the_things(base, tmp_path):
    run = make_run(config_of(tmp_path, **RELATION), base)
    steering, word = run.objective.steering, run.method.word
    batch = run.objective.draw(0)
    names = word.encoders[0].tokenizer.inv_vocab
    positives = {names[i] for i in batch.positives["clip_l"].flatten().tolist() if i >= 0}
    assert positives <= {"above", "below", "left", "right", "of"}
    described = {names[i] for i in negative_ids(batch.ids["clip_l"], steering._excluded["clip_l"]).tolist()}
    assert described
    assert described <= {*SIZES, *COLOURS, *SHAPES}
    drawn = torch.cat([run.objective.draw(step).timesteps for step in range(200)]).float()
    assert drawn.mean() == pytest.approx(601, abs=4 * 275 / 800**0.5)


def test_the_steering_loss_draws_the_vectors_to_words_of_relations(base, tmp_path):
    far = []
    for weight in (0.0, 10.0):
        embedding = RELATION["embedding"] | {"start": "red", "relation": {"weight": weight}}
        run = make_run(config_of(tmp_path, embedding=embedding), base)
        steering = Steering(run.method.word, run.config.embedding.relation)
        for _ in range(6):
            run.train_step()
        assert ("steering" in run.objective.told()) is (weight > 0)
        batch = run.objective.draw(0)
        far.append(steering(batch.ids, steering.drawn(4, seeded(0))).item())
    assert far[1] < far[0]


def test_word_lists_hold_words_of_one_text(base):
    for kind in ("object", "style"):
        texts = lines_of(LISTS / f"{kind}.txt")
        assert len(texts) == len(set(texts)) >= 15
        assert all(text.count("{}") == 1 for text in texts)
    words = lines_of(LISTS / "relations.txt")
    assert len(words) == len(set(words)) >= 40


def test_the_judge_tells_the_relation_from_those_of_the_vocabulary():
    reader, stream = load_reader("reader_b"), seeded(1)
    scenes, captions = lesson(DIAGONAL, 40, stream)
    assert shows(read(reader, render(scenes, stream)), captions, DIAGONAL).float().mean() > 0.9
    assert text_of(captions[0], DIAGONAL).count("{}") == 1
    turned = scenes[torch.arange(40)]
    turned.centre = scenes.centre.flip(1)
    assert not shows(read(reader, render(turned, stream)), captions, DIAGONAL).any()
    scenes, captions = lesson("star", 40, stream)
    assert all("star" in str(c) and "star" not in text_of(c, "star") for c in captions)
    assert shows(read(reader, render(scenes, stream)), captions, "star").float().mean() > 0.9
