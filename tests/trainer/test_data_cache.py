import io
import os
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from maskunet_core.training.data import BadData
from maskunet_core.training.texts import by_length, joined
from trainer.data import store
from trainer.data.cache import Cache, prepare
from trainer.data.cache import Encoders as EncodersOf
from trainer.data.decoding import Record
from trainer.data.share import ALONE, Share
from trainer.data.store import ShardStore, key_of

SQUARE = [(32, 32)]


def picture(left, right="black", size=(32, 32)) -> bytes:
    """Two halves, so that the mirrored picture differs."""
    image = Image.new("RGB", size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def record(name: str, data: bytes, caption: str | None = None) -> Record:
    return Record(name, name if caption is None else caption, lambda: data)


def records_of(*colours: str) -> list[Record]:
    return [record(colour, picture(colour)) for colour in colours]


class Encoders:
    """Average pooling for pictures, a caption's letters for texts; counts what it is asked for."""

    def __init__(self):
        self.pictures, self.texts = 0, Counter()

    def picture(self, pixels):
        self.pictures += 1
        return F.avg_pool2d(pixels, 8)

    def text(self, caption):
        self.texts[caption] += 1
        letters = torch.tensor([ord(letter) for letter in caption.ljust(8)[:8]])
        return {"cross": letters.float().view(4, 2) / 128, "ids": letters}

    def prepare(self, records, folder: Path, fingerprint="", broken_limit=0.0, share=ALONE, cache=None, **changes):
        """changes: of the encoders."""
        settings = {"sizes": SQUARE, "picture_key": "vae", "text_key": "clip", "flip": False}
        settings |= {"picture": self.picture, "text": self.text}
        options = {"fingerprint": fingerprint, "broken_limit": broken_limit, "progress": False}
        return prepare(records, EncodersOf(**settings | changes), cache or Cache(folder, share=share), **options)

    @property
    def work(self) -> tuple[int, int]:
        """(pictures, texts) encoded."""
        return self.pictures, sum(self.texts.values())


@pytest.fixture
def encoders():
    return Encoders()


def no_dropout(rows):
    return torch.zeros(len(rows), dtype=torch.bool)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def latent_files(folder: Path) -> list[Path]:
    return files_of(folder / "latents")


# What comes out


def test_latents_and_conditions_are_what_the_encoders_gave(tmp_path, encoders):
    data = encoders.prepare(records_of("red", "blue"), tmp_path)
    assert (len(data), data.names, data.captions) == (2, ["red", "blue"], ["red", "blue"])
    rows = torch.tensor([1, 0])
    latents = data.latents(rows)
    expected = torch.zeros(2, 3, 4, 4)
    expected[0, 2, :, :2] = expected[1, 0, :, :2] = 1
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected)
    conditions = data.conditions(rows, no_dropout(rows))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in conditions.items()} == {
        "cross": (torch.float32, (2, 4, 2)),
        "ids": (torch.int64, (2, 8)),
    }
    assert bytes(conditions["ids"][0].tolist()) == b"blue    "
    torch.testing.assert_close(conditions["cross"][1], encoders.text("red")["cross"], atol=1e-3, rtol=0)


def test_dropped_captions_give_the_empty_embedding(tmp_path, encoders):
    data = encoders.prepare(records_of("red", "blue"), tmp_path)
    conditions = data.conditions(torch.tensor([0, 1]), torch.tensor([True, False]))
    assert [bytes(ids) for ids in conditions["ids"].tolist()] == [b"        ", b"blue    "]


def test_mirrored_latents_differ_from_upright_ones(tmp_path, encoders):
    data = encoders.prepare(records_of("red", "blue"), tmp_path, flip=True)
    assert encoders.pictures == 4
    rows = torch.tensor([0, 0, 1])
    latents = data.latents(rows, torch.tensor([False, True, True]))
    assert latents[0, 0, :, :2].eq(1).all()
    assert latents[0, 0, :, 2:].eq(0).all()
    torch.testing.assert_close(latents[1], latents[0].flip(-1))
    torch.testing.assert_close(latents[2], data.latents(torch.tensor([1]))[0].flip(-1))


def test_mirrored_latents_have_to_be_prepared(tmp_path, encoders):
    data = encoders.prepare(records_of("red"), tmp_path)
    assert data.latents(torch.tensor([0]), torch.tensor([False])).shape == (1, 3, 4, 4)
    with pytest.raises(ValueError, match="prepared without flips"):
        data.latents(torch.tensor([0]), torch.tensor([True]))


def test_pictures_go_into_the_bucket_of_their_ratio(tmp_path, encoders):
    sizes = [(16, 32), (32, 32), (32, 16)]
    shapes = {"wide": (64, 30), "square": (50, 50), "tall": (20, 40), "panorama": (300, 40)}
    records = [record(name, picture("red", size=size)) for name, size in shapes.items()]
    data = encoders.prepare(records, tmp_path, sizes=sizes)
    assert [bucket.tolist() for bucket in data.buckets] == [[0, 3], [2], [1]]
    assert data.latents(data.buckets[0]).shape == (2, 3, 2, 4)
    assert data.latents(data.buckets[1]).shape == (1, 3, 4, 2)


def test_turned_pictures_go_into_the_bucket_that_they_are_seen_in(tmp_path, encoders):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32), "red").save(buffer, "JPEG", exif=exif)
    data = encoders.prepare([record("turned", buffer.getvalue())], tmp_path, sizes=[(16, 32), (32, 16)])
    assert data.latents(torch.tensor([0])).shape == (1, 3, 4, 2)


def test_what_fp16_cannot_hold_is_kept_in_fp32(tmp_path, encoders):
    values = {"": torch.full((2,), 0.1), "red": torch.full((2,), 1e6), "blue": torch.full((2,), 0.1)}
    brain = torch.tensor([3e38]).bfloat16()

    def encode(caption):
        return {"cross": values[caption], "brain": brain}

    data = encoders.prepare(records_of("red", "blue"), tmp_path, text=encode)
    rows = torch.tensor([0, 1])
    conditions = data.conditions(rows, no_dropout(rows))
    assert conditions["cross"].dtype == torch.float32
    assert conditions["cross"][0].tolist() == [1e6, 1e6]
    assert conditions["cross"][1].tolist() == [float(torch.tensor(0.1).half())] * 2
    assert conditions["brain"][0] == brain.float()
    store = ShardStore(tmp_path / "text")
    stored = [store.get(key_of("text", caption, "clip")) for caption in values]
    assert Counter(text["cross"].dtype for text in stored) == {torch.float16: 2, torch.float32: 1}
    assert {text["brain"].dtype for text in stored} == {torch.bfloat16}


# What is encoded, and when


def test_a_second_run_encodes_nothing(tmp_path, encoders):
    first = encoders.prepare(records_of("red", "blue"), tmp_path, flip=True)
    assert encoders.work == (4, 3)
    again = Encoders()
    second = again.prepare(records_of("red", "blue"), tmp_path, flip=True)
    assert again.work == (0, 0)
    rows = torch.tensor([0, 1])
    assert torch.equal(first.latents(rows), second.latents(rows))
    assert not [path for path in files_of(tmp_path) if path.suffix != ".arrow"]


def test_equal_captions_are_encoded_once(tmp_path, encoders):
    encoders.prepare([record(name, picture(name), "a colour") for name in ("red", "blue", "lime")], tmp_path)
    assert encoders.texts == {"": 1, "a colour": 1}


CHANGES = {
    "content": ({"records": [record("red", picture("red")), record("blue", picture("navy"))]}, (1, 0)),
    "caption": ({"records": [record("red", picture("red")), record("blue", picture("blue"), "sky")]}, (0, 1)),
    "one more": ({"records": records_of("red", "blue", "lime")}, (1, 1)),
    "renamed": ({"records": [record("other", picture("red"), "red"), record("blue", picture("blue"))]}, (0, 0)),
    "picture encoder": ({"picture_key": "other"}, (2, 0)),
    "text encoder": ({"text_key": "other"}, (0, 3)),
    "size": ({"sizes": [(16, 16)]}, (2, 0)),
    "flip": ({"flip": True}, (2, 0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_encodes_only_what_it_concerns(tmp_path, encoders, change):
    encoders.prepare(records_of("red", "blue"), tmp_path)
    again = Encoders()
    changes, work = CHANGES[change]
    again.prepare(**{"records": records_of("red", "blue"), "folder": tmp_path} | changes)
    assert again.work == work


def test_an_interrupted_preparation_goes_on(tmp_path, encoders):
    def interrupted(pixels):
        if encoders.pictures == 2:
            raise KeyboardInterrupt
        return encoders.picture(pixels)

    with pytest.raises(KeyboardInterrupt):
        encoders.prepare(records_of("red", "blue", "lime"), tmp_path, picture=interrupted)
    again = Encoders()
    assert len(again.prepare(records_of("red", "blue", "lime"), tmp_path)) == 3
    assert again.pictures == 1


def cut_in_half(path, other):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path, other):
    path.write_bytes(b"")


def removed(path, other):
    path.unlink()


def one_bit(path, other):
    """Of the last tensor's numbers."""
    data = bytearray(path.read_bytes())
    data[data.rindex(b"data_offsets") + 60] ^= 64
    path.write_bytes(data)


def no_arrow(path, other):
    path.write_bytes(b"hello, this is no such file")


def of_another_picture(path, other):
    path.write_bytes(other.read_bytes())


DAMAGES = [cut_in_half, emptied, removed, one_bit, no_arrow, of_another_picture]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_again(tmp_path, encoders, damage):
    rows = torch.tensor([0, 1])
    encoders.prepare(records_of("red"), tmp_path)
    whole = encoders.prepare(records_of("red", "blue"), tmp_path).latents(rows)
    first, second = latent_files(tmp_path)
    damage(first, second)
    again = Encoders()
    data = again.prepare(records_of("red", "blue"), tmp_path)
    assert again.work == (1, 0)
    assert torch.equal(data.latents(rows), whole)


@pytest.mark.parametrize("left", [0, 100, -100])
def test_a_table_that_is_cut_off_is_made_again(tmp_path, encoders, left):
    encoders.prepare(records_of("red", "blue"), tmp_path, fingerprint="as before")
    (part,) = files_of(tmp_path / "sets")
    part.write_bytes(part.read_bytes()[:left])
    data = encoders.prepare(records_of("red", "blue"), tmp_path, fingerprint="as before")
    assert data.names == ["red", "blue"]
    assert encoders.work == (2, 3), "only the table was lost"


def test_a_damaged_text_is_made_again(tmp_path, encoders):
    encoders.prepare(records_of("red", "blue"), tmp_path)
    one_bit(files_of(tmp_path / "text")[0], None)
    again = Encoders()
    again.prepare(records_of("red", "blue"), tmp_path)
    assert again.work == (0, 1)


def test_damage_while_training_is_told_and_mended_by_the_next_start(tmp_path, encoders):
    data = encoders.prepare(records_of("red", "blue"), tmp_path, "as named")
    whole = data.latents(torch.tensor([0, 1]))
    one_bit(latent_files(tmp_path)[0], None)
    with pytest.raises(BadData, match="was damaged or removed meanwhile: start the run again"):
        data.latents(torch.tensor([0, 1]))
    again = Encoders()
    assert torch.equal(
        again.prepare(records_of("red", "blue"), tmp_path, "as named").latents(torch.tensor([0, 1])), whole
    )
    assert again.work == (1, 0)


# Of records that are named


def unreadable(name: str) -> Record:
    def read() -> bytes:
        raise AssertionError("A picture is read again.")

    return Record(name, name, read)


def test_a_named_set_is_begun_without_reading_a_picture(tmp_path, encoders):
    colours = ("red", "blue", "lime")
    first = encoders.prepare(records_of(*colours), tmp_path, "as named", flip=True)
    again = Encoders()
    second = again.prepare([unreadable(colour) for colour in colours], tmp_path, "as named", flip=True)
    assert again.work == (0, 0)
    rows, flips = torch.tensor([2, 0, 2]), torch.tensor([True, False, False])
    assert torch.equal(first.latents(rows, flips), second.latents(rows, flips))
    assert second.names == list(colours)
    assert (first.digests == second.digests).all()
    assert again.prepare(records_of("red", "blue", "tan"), tmp_path, "another name", flip=True).names[2] == "tan"
    assert again.work == (2, 1)


MANY = [f"#{value:02x}{value:02x}40" for value in range(90)]


def in_processes(count: int, work) -> list:
    """What work(share) returns in each of so many; threads stand for processes."""
    barrier, numbers = threading.Barrier(count), [0.0] * count

    def share(index: int) -> Share:
        def sum_of(number: float) -> float:
            numbers[index] = number
            barrier.wait()
            total = sum(numbers)
            barrier.wait()
            return total

        return Share(index, count, barrier.wait, sum_of)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda index: work(share(index)), range(count)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that may be killed without starting anew")
def test_a_killed_encoding_goes_on_in_another_number_of_processes(tmp_path, encoders, monkeypatch):
    monkeypatch.setattr(store, "SHARD", 16)

    def killed(pixels):
        if encoders.pictures == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return encoders.picture(pixels)

    if not (child := os.fork()):
        encoders.prepare(records_of(*MANY), tmp_path, "as named", picture=killed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    both = [Encoders(), Encoders()]
    found = in_processes(
        2, lambda share: both[share.index].prepare(records_of(*MANY), tmp_path, "as named", share=share)
    )
    # Two parts of 16 had been written, of the third nothing; what is left is shared.
    assert sorted(one.pictures for one in both) == [26, 32]
    whole = Encoders().prepare(records_of(*MANY), tmp_path / "whole")
    rows = torch.arange(len(MANY))
    for data in found:
        assert data.names == whole.names
        assert (data.digests == whole.digests).all()
        assert torch.equal(data.latents(rows), whole.latents(rows))
        assert torch.equal(
            data.conditions(rows, no_dropout(rows))["ids"], whole.conditions(rows, no_dropout(rows))["ids"]
        )


def test_machines_with_caches_of_their_own_meet_in_a_shared_folder(tmp_path):
    """What one of them has encoded before is taken from its cache."""
    Encoders().prepare(records_of(*MANY[:16]), tmp_path / "cache 0")
    both = [Encoders(), Encoders()]

    def work(share: Share):
        cache = Cache(tmp_path / f"cache {share.index}", tmp_path / "shared", share)
        return both[share.index].prepare(records_of(*MANY), None, "as named", cache=cache)

    found = in_processes(2, work)
    assert [one.pictures for one in both] == [32, 42]
    rows = torch.arange(len(MANY))
    assert torch.equal(found[0].latents(rows), found[1].latents(rows))
    assert not (tmp_path / "cache 1").exists()


def test_keys_do_not_run_into_each_other():
    assert key_of("latent", "ab", 12, 3) != key_of("latent", "ab", 1, 23)
    assert key_of("text", "a", "bc") != key_of("text", "ab", "c")


# What is wrong with the data


def test_broken_pictures_are_named_and_left_out(tmp_path, encoders, capsys):
    broken = [record("cut", picture("red")[:60]), record("none", b"hello")]
    data = encoders.prepare([*records_of("red", "blue"), *broken, *records_of("lime")], tmp_path, broken_limit=0.5)
    assert data.names == ["red", "blue", "lime"]
    assert [name for name, _ in data.skipped] == ["cut", "none"]
    assert data.skipped[1] == ("none", "it is not a picture of a known format")
    assert "Left out: 'none' cannot be read: it is not a picture of a known format." in capsys.readouterr().out
    assert set(encoders.texts) == {"", "red", "blue", "lime"}


def test_too_many_broken_pictures_stop_the_run(tmp_path, encoders):
    records = [*records_of("red", "blue", "lime"), record("cut", picture("red")[:60])]
    assert len(encoders.prepare(records, tmp_path, broken_limit=0.25)) == 3
    with pytest.raises(BadData) as caught:
        encoders.prepare(records, tmp_path, broken_limit=0.2)
    allowed = "1 of 4 pictures (25.0%) cannot be read, and data.broken_limit allows 20.0%: 'cut' ("
    assert str(caught.value).startswith(allowed)


def test_a_data_set_with_nothing_left_is_refused(tmp_path, encoders):
    with pytest.raises(BadData, match="The data set holds no pictures"):
        encoders.prepare([], tmp_path)
    broken = [record(f"{number:02}", b"hello") for number in range(12)]
    none_left = r"12 of 12 pictures \(100.0%\) cannot be read, and none is left: '00' .* and 2 more"
    with pytest.raises(BadData, match=none_left):
        encoders.prepare(broken, tmp_path, broken_limit=1.0)


def test_values_that_are_not_finite_are_refused(tmp_path, encoders):
    with pytest.raises(BadData, match="The latent of 'red' holds values that are not finite: run its encoder in fp32"):
        encoders.prepare(records_of("red"), tmp_path, picture=lambda pixels: pixels / 0)
    with pytest.raises(BadData, match="The text embedding of '' holds values that are not finite"):
        encoders.prepare(records_of("red"), tmp_path, text=lambda _: {"cross": torch.tensor([float("nan")])})
    assert not files_of(tmp_path / "text")


def test_embeddings_that_do_not_fit_into_one_batch_are_refused(tmp_path, encoders):
    shapes = "'red' has the shapes {'cross': .3,.}, that of the empty caption {'cross': .0,.}"
    with pytest.raises(BadData, match=shapes):
        encoders.prepare(records_of("red"), tmp_path, text=lambda caption: {"cross": torch.ones(5, len(caption))})


def test_texts_of_any_length_share_a_batch(tmp_path, encoders):
    def encode(caption: str) -> dict[str, torch.Tensor]:
        letters = torch.tensor([float(ord(letter)) for letter in caption or " "])
        return {"cross": letters[:, None].expand(-1, 3).contiguous(), "pooled": letters[:1]}

    data = encoders.prepare(records_of("red", "tan", "orange"), tmp_path, text=encode)
    conditions = data.conditions(torch.tensor([2, 0, 1, 1]), torch.tensor([False, False, False, True]))
    seen = {}
    for rows, group in by_length(conditions):
        assert set(group) == {"cross", "pooled"}
        for row, cross, pooled in zip(rows.tolist(), group["cross"], group["pooled"]):
            seen[row] = {"cross": cross, "pooled": pooled}
    for row, caption in enumerate([data.captions[2], data.captions[0], data.captions[1], ""]):
        assert all(torch.equal(seen[row][name], value) for name, value in encode(caption).items())
    both = joined(conditions, conditions)
    assert [rows.tolist() for rows, _ in by_length(both)] == [[3, 7], [1, 2, 5, 6], [0, 4]]


# Splits

GREYS = [f"#{value:02x}{value:02x}{value:02x}" for value in range(0, 240, 8)]


def test_a_split_takes_every_picture_once(tmp_path, encoders):
    data = encoders.prepare(records_of(*GREYS), tmp_path)
    rest, held_out = data.split(5, seed=0)
    assert (len(rest), len(held_out)) == (len(GREYS) - 5, 5)
    assert sorted(rest.names + held_out.names) == sorted(GREYS)
    row = data.names.index(held_out.names[2])
    assert torch.equal(held_out.latents(torch.tensor([2])), data.latents(torch.tensor([row])))
    assert [len(part) for part in data.split(0, seed=0)] == [len(GREYS), 0]


def test_a_split_depends_on_content_and_seed_alone(tmp_path, encoders):
    held_out = encoders.prepare(records_of(*GREYS), tmp_path).split(5, seed=0)[1]
    backwards = encoders.prepare(records_of(*GREYS[::-1]), tmp_path)
    assert set(backwards.split(5, seed=0)[1].names) == set(held_out.names)
    assert set(backwards.split(5, seed=1)[1].names) != set(held_out.names)


def test_added_pictures_bring_no_trained_one_into_the_held_out_part(tmp_path, encoders):
    before = set(encoders.prepare(records_of(*GREYS), tmp_path).split(5, seed=0)[1].names)
    colours = [f"#{value:02x}0000" for value in range(8, 250, 8)]
    after = set(encoders.prepare(records_of(*GREYS, *colours), tmp_path).split(5, seed=0)[1].names)
    assert len(after) == 5
    assert after & set(GREYS) <= before
    assert before & after


def test_copies_of_a_picture_stay_together(tmp_path, encoders):
    copies = [record(f"copy {colour}", picture(colour)) for colour in GREYS]
    rest, held_out = encoders.prepare([*records_of(*GREYS), *copies], tmp_path).split(3, seed=0)
    assert len(held_out) == 4
    assert not {name.removeprefix("copy ") for name in rest.names} & set(held_out.names)


def test_a_split_leaves_something_to_train_on(tmp_path, encoders):
    data = encoders.prepare(records_of("red", "blue"), tmp_path)
    with pytest.raises(BadData, match=r"Holding out 2 of 2 pictures \(2 of them different\) leaves none to train on"):
        data.split(2, seed=0)
