import io
import json
import sys
import tarfile
import unicodedata

import numpy as np
import pytest
from PIL import Image

from maskunet_core.training.data import BadData
from trainer.data.decoding import BadPicture, Record, decode, picture_size
from trainer.data.records import fingerprint, scan


def encoded(colour, size=(8, 6), kind="PNG", mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind, **options)
    return buffer.getvalue()


RED, GREEN, BLUE = (encoded(colour) for colour in ("red", "lime", "blue"))


def write(folder, files):
    """files: {path: text, bytes, or a list of objects for a file of JSON lines}"""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def write_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            content = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_table(path, columns, **options):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def open_records(path, caption_column=""):
    return scan(path, caption_column).require()


def contents(records):
    return [(record.name, record.caption, record.read()) for record in records]


def as_record(data: bytes) -> Record:
    return Record("picture", "", lambda: data)


# Folders of pictures


def test_captions_lie_beside_pictures(tmp_path):
    write(
        tmp_path,
        {"b.PNG": RED, "b.txt": "red\n", "a/x.png": GREEN, "a/x.TXT": "\ufeffgrün", "a.png": BLUE, "a.txt": ""},
    )
    assert contents(open_records(tmp_path)) == [("a.png", "", BLUE), ("a/x.png", "grün", GREEN), ("b.PNG", "red", RED)]


def test_every_listed_format_is_a_picture(tmp_path):
    for kind, ending in (("PNG", "png"), ("JPEG", "jpg"), ("JPEG", "jpeg"), ("WEBP", "webp"), ("BMP", "bmp")):
        write(tmp_path, {f"{ending}.{ending}": encoded("red", kind=kind), f"{ending}.txt": ending})
    records = open_records(str(tmp_path))
    assert [record.caption for record in records] == ["bmp", "jpeg", "jpg", "png", "webp"]
    assert all(decode(record).getpixel((3, 3))[0] > 250 for record in records)


def test_hidden_files_and_folders_are_left_out(tmp_path):
    write(tmp_path, {"a.png": RED, "a.txt": "red", "s/._a.png": b"x", ".cache/b.png": b"x"})
    assert [record.name for record in open_records(tmp_path)] == ["a.png"]


def test_captions_in_metadata_jsonl(tmp_path):
    lines = [
        {"file_name": "z.png", "text": "red"},
        "",
        {"file_name": "s/a.png", "caption": "green", "prompt": "a lime"},
    ]
    write(
        tmp_path, {"sub/metadata.jsonl": lines, "sub/z.png": RED, "sub/s/a.png": GREEN, "b.png": BLUE, "b.txt": "blue"}
    )
    expected = [("b.png", "blue", BLUE), ("sub/s/a.png", "green", GREEN), ("sub/z.png", "red", RED)]
    assert contents(open_records(tmp_path)) == expected


def test_the_caption_field_can_be_named(tmp_path):
    lines = [{"file_name": "a.png", "text": "red", "prompt": "crimson"}, {"file_name": "b.png", "text": "blue"}]
    write(tmp_path, {"metadata.jsonl": lines, "a.png": RED, "b.png": BLUE})
    found = scan(tmp_path, "prompt")
    assert [record.caption for record in found.records] == ["crimson"]
    assert found.problems == ["Line 2 of 'metadata.jsonl' has no caption: it needs 'prompt' with a text."]


def test_a_picture_may_have_several_captions(tmp_path):
    lines = [{"file_name": "a.png", "text": text} for text in ("red", "crimson")]
    write(tmp_path, {"metadata.jsonl": lines, "a.png": RED})
    assert [record.caption for record in open_records(tmp_path)] == ["red", "crimson"]


def test_every_problem_of_a_folder_is_told_at_once(tmp_path):
    lines = [
        {"file_name": "a.png", "text": "red"},
        "{no json",
        {"text": "no name"},
        {"file_name": "gone.png", "text": "gone"},
        {"file_name": "b.png", "label": 3},
        [1],
    ]
    pictures = {"a.png": RED, "b.png": RED, "c.png": RED, "d.png": RED}
    write(tmp_path, {"metadata.jsonl": lines, **pictures, "d.txt": b"\xff\xfe\xff", "orphan.txt": "nobody"})
    found = scan(tmp_path)
    assert [record.name for record in found.records] == ["a.png"]
    assert sorted(found.problems) == [
        "'c.png' has no caption: write it into 'c.txt' beside it.",
        "'d.txt' is not UTF-8 text: save it as UTF-8.",
        "'orphan.txt' has no picture beside it: add it or remove the caption.",
        "Line 2 of 'metadata.jsonl' is not JSON: "
        "Expecting property name enclosed in double quotes: line 1 column 2 (char 1).",
        "Line 3 of 'metadata.jsonl' has no 'file_name' with the path of a picture.",
        "Line 4 of 'metadata.jsonl' names 'gone.png', but there is no such picture: add it or remove the line.",
        "Line 5 of 'metadata.jsonl' has no caption: it needs 'text' or 'caption' or 'TEXT' with a text.",
        "Line 6 of 'metadata.jsonl' is not a JSON object with 'file_name' and a caption.",
    ]
    with pytest.raises(BadData) as caught:
        open_records(tmp_path)
    assert str(caught.value).splitlines() == found.problems


def test_ten_problems_of_a_kind_are_named_and_the_rest_counted(tmp_path):
    write(tmp_path, {f"{number:02}.png": RED for number in range(14)} | {"x.txt": "nobody"})
    problems = scan(tmp_path).problems
    assert [problem.split("'")[1] for problem in problems[:10]] == [f"{number:02}.png" for number in range(10)]
    assert problems[10] == "Pictures without captions: 4 more."
    assert len(problems) == 12


def test_a_path_without_data_gets_a_sentence(tmp_path):
    assert (
        scan(tmp_path / "nothing").problems[0].startswith(f"'{tmp_path / 'nothing'}' does not exist: name a folder of")
    )
    assert "holds no pictures (bmp, jpeg, jpg, png, webp)" in scan(tmp_path).problems[0]
    write(tmp_path, {"a.png": RED, "b.tar": b""})
    assert "is a file of a kind that holds no data set: name a folder of" in scan(tmp_path / "a.png").problems[0]
    assert scan(tmp_path).problems == [
        f"'{tmp_path}' holds both pictures and 'b.tar': name a folder with only one of them."
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="links to folders need rights there")
def test_linked_folders_are_walked_through_and_circles_end(tmp_path):
    write(tmp_path / "data", {"a.png": RED, "a.txt": "red"})
    write(tmp_path / "far", {"b.png": GREEN, "b.txt": "green", "deep/c.png": BLUE, "deep/c.txt": "blue"})
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "deep" / "round").symlink_to(tmp_path / "far")
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data")
    names = [record.name for record in open_records(tmp_path / "data")]
    assert names == ["a.png", "linked/b.png", "linked/deep/c.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="links to folders need rights there")
def test_links_that_lead_nowhere_are_counted(tmp_path):
    write(tmp_path, {"a.png": RED, "a.txt": "red"})
    for name in ("b.png", "b.txt", "folder"):
        (tmp_path / name).symlink_to(tmp_path / "gone")
    found = scan(tmp_path)
    assert [record.name for record in found.records] == ["a.png"]
    assert found.problems == []
    assert found.notes == [
        "Left out: 3 links that lead nowhere (b.png, b.txt, folder). Mend them where they are pictures or captions."
    ]


def test_texts_that_are_none_are_told(tmp_path):
    """UTF-16 without its mark, halves of letters in JSON, JSON that nests without end."""
    lines = [{"file_name": "b.png", "text": "red \ud800"}, "[" * 100_000]
    write(tmp_path, {"a.png": RED, "a.txt": "red".encode("utf-16-le"), "b.png": RED, "metadata.jsonl": lines})
    first, second, third = scan(tmp_path).problems
    assert first == "Line 1 of 'metadata.jsonl' has no caption: it needs 'text' or 'caption' or 'TEXT' with a text."
    assert second.startswith("Line 2 of 'metadata.jsonl' is not JSON: ")
    assert third == "'a.txt' is not UTF-8 text: save it as UTF-8."
    nested = {"a.png": RED, "a.json": "[" * 100_000}
    found = scan(write_shard(tmp_path / "a.tar", nested))
    assert found.problems[0].startswith("'a.tar/a.png' has no caption")


def test_accents_may_be_spelled_in_two_ways(tmp_path):
    split, whole = (unicodedata.normalize(form, "café") for form in ("NFD", "NFC"))
    write(tmp_path / "beside", {f"{split}.png": RED, f"{whole}.txt": "red"})
    write(tmp_path / "listed", {f"{split}.png": RED, "metadata.jsonl": [{"file_name": f"{whole}.png", "text": "red"}]})
    for folder in ("beside", "listed"):
        assert contents(open_records(tmp_path / folder)) == [(f"{whole}.png", "red", RED)]


def test_what_is_left_out_of_a_folder_is_counted(tmp_path):
    write(
        tmp_path, {"a.png": RED, "a.txt": "red", "b.gif": b"x", "c.TIF": b"x", "README.txt": "x", "s/License.txt": "x"}
    )
    found = scan(tmp_path)
    assert [record.name for record in found.records] == ["a.png"]
    assert found.problems == []
    kinds = "convert pictures of other kinds to one of bmp, jpeg, jpg, png, webp"
    assert found.notes == [
        f"Left out: 2 pictures of kinds that are not read (b.gif, c.TIF). To train on them, {kinds}.",
        "Left out: 2 texts that are no captions (README.txt, s/License.txt). They have no picture of their name.",
    ]


def test_captions_of_pictures_of_other_kinds_say_so(tmp_path):
    absolute = {"file_name": str(tmp_path / "a.png"), "text": "red"}
    write(
        tmp_path,
        {
            "metadata.jsonl": [absolute, {"file_name": "b.gif", "text": "x"}],
            "a.png": RED,
            "b.gif": b"",
            "c.tif": b"",
            "c.txt": "",
        },
    )
    found = scan(tmp_path)
    assert [record.caption for record in found.records] == ["red"]
    kinds = "convert pictures of other kinds to one of bmp, jpeg, jpg, png, webp"
    assert found.problems == [
        f"Line 2 of 'metadata.jsonl' names 'b.gif', which is of a kind that is not read: {kinds}, or remove the line.",
        f"'c.txt' belongs to 'c.tif': {kinds}, or remove both.",
    ]


def test_splits_to_test_on_are_left_out_and_counted(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "folders", {f"{split}/a.png": RED, f"{split}/a.txt": split})
        (tmp_path / "shards").mkdir(exist_ok=True)
        write_shard(tmp_path / "shards" / f"{split}-0.tar", {"a.png": RED, "a.txt": split})
    for folder, name in (("folders", "test/a.png"), ("shards", "test-0.tar")):
        found = scan(tmp_path / folder)
        assert [record.caption for record in found.records] == ["train"]
        assert found.notes[0].startswith("Left out: ")
        assert "files of splits that are there to test" in found.notes[0]
        assert name in found.notes[0]
    # Alone, it has been chosen.
    assert [record.caption for record in open_records(tmp_path / "folders" / "test")] == ["test"]
    # So have pictures that are listed by name.
    lines = [{"file_name": f"{split}/a.png", "text": split} for split in ("train", "test")]
    write(tmp_path / "folders", {"metadata.jsonl": lines})
    assert len(scan(tmp_path / "folders").records) == 2


# Webdataset shards


def test_shards_are_read_in_place(tmp_path):
    write_shard(
        tmp_path / "1.tar", {"b.jpg": RED, "b.txt": " red ", "./a.PNG": GREEN, "./a.json": '{"caption": "lime"}'}
    )
    write_shard(
        tmp_path / "0.tar", {"x/c.png": BLUE, "x/c.txt": "blue", "x/c.json": '{"text": "navy"}', "x/c.cls": "1"}
    )
    records = open_records(tmp_path)
    assert contents(records) == [
        ("0.tar/x/c.png", "blue", BLUE),
        ("1.tar/./a.png", "lime", GREEN),
        ("1.tar/b.jpg", "red", RED),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"0.tar", "1.tar"}
    assert [record.caption for record in open_records(tmp_path / "0.tar", "text")] == ["navy"]


def test_tables_beside_shards_are_not_mistaken_for_data(tmp_path):
    write_shard(tmp_path / "0.tar", {"a.png": RED, "a.txt": "red"})
    write(tmp_path, {"0.parquet": b"statistics", "0_stats.json": "{}"})
    assert [record.name for record in open_records(tmp_path)] == ["0.tar/a.png"]


def test_problems_of_shards(tmp_path):
    members = {
        "a.png": RED,
        "b.txt": "nobody",
        "c.png": RED,
        "c.json": "{oh",
        "d.png": RED,
        "d.txt": "red",
        "e.cls": "1",
    }
    write_shard(tmp_path / "0.tar", members)
    write(tmp_path, {"1.tar": (tmp_path / "0.tar").read_bytes()[:1400], "2.tar": b"hello"})
    found = scan(tmp_path)
    assert [record.name for record in found.records] == ["0.tar/d.png"]
    lacking = "it needs a .txt in UTF-8, or a .json with 'text' or 'caption' or 'TEXT', in the shard."
    assert found.problems[:3] == [
        f"'0.tar/a.png' has no caption: {lacking}",
        f"'0.tar/c.png' has no caption: {lacking}",
        "'0.tar/b.txt' has no picture in the shard: add it or remove the caption.",
    ]
    assert [problem.split(" (")[0] for problem in found.problems[3:]] == [
        "'1.tar' is not a readable .tar file",
        "'2.tar' is not a readable .tar file",
    ]


def test_a_shard_damaged_in_its_middle_is_not_taken_for_a_short_one(tmp_path):
    path = write_shard(tmp_path / "0.tar", {"a.png": RED, "a.txt": "red", "b.png": RED, "b.txt": "red"})
    data = bytearray(path.read_bytes())
    data[1024:1100] = b"x" * 76  # the second header
    path.write_bytes(data)
    assert scan(path).problems == [
        "'0.tar' is not a readable .tar file (a header in its middle is damaged): copy or download it again."
    ]


def test_an_empty_shard_holds_no_pictures(tmp_path):
    assert "holds no pictures: name" in scan(write_shard(tmp_path / "0.tar", {})).problems[0]


# Tables


def test_parquet_files_with_structs_and_with_bytes(tmp_path):
    structs = [{"bytes": data, "path": None} for data in (RED, GREEN, BLUE)]
    write_table(tmp_path / "b.parquet", {"image": structs, "TEXT": ["red", "green", " blue"]}, row_group_size=2)
    write_table(tmp_path / "a.parquet", {"caption": ["lime"], "image": [GREEN], "prompt": ["grass"]})
    assert contents(open_records(tmp_path)) == [
        ("a.parquet row 0", "lime", GREEN),
        ("b.parquet row 0", "red", RED),
        ("b.parquet row 1", "green", GREEN),
        ("b.parquet row 2", "blue", BLUE),
    ]
    assert [record.caption for record in open_records(tmp_path / "a.parquet", "prompt")] == ["grass"]


@pytest.mark.parametrize("group", [7, 20, 100])
def test_parquet_rows_are_found_in_any_order(tmp_path, group):
    pictures = [encoded((value, 0, 0)) for value in range(50)]
    for name in ("a.parquet", "b.parquet"):
        write_table(tmp_path / name, {"image": pictures, "text": ["x"] * 50}, row_group_size=group)
    records = open_records(tmp_path)
    for row in (3, 3, 49, 48, 99, 0, 17, 50, 16, *range(100)):
        assert records[row].read() == pictures[row % 50]


def test_paths_in_parquet_files_start_from_the_file(tmp_path):
    pytest.importorskip("pyarrow")
    write(tmp_path, {"pictures/a.png": RED})
    write_table(
        tmp_path / "a.parquet",
        {"image": [{"bytes": None, "path": "pictures/a.png"}, {"bytes": b"x", "path": ""}], "text": ["red", "x"]},
    )
    assert open_records(tmp_path / "a.parquet")[0].read() == RED


def test_problems_of_parquet_files(tmp_path):
    write_table(tmp_path / "a.parquet", {"image": [RED, RED], "text": ["red", None]})
    write_table(tmp_path / "b.parquet", {"URL": ["http"], "TEXT": ["red"]})
    write_table(tmp_path / "c.parquet", {"image": ["a.png"], "text": ["red"]})
    write_table(tmp_path / "d.parquet", {"image": [RED], "label": [1]})
    write(tmp_path, {"e.parquet": b"hello"})
    found = scan(tmp_path)
    assert [record.name for record in found.records] == ["a.parquet row 0"]
    needs = (
        "needs a column 'image' with the bytes of picture files and a caption column "
        "('text' or 'caption' or 'TEXT'; another is set as data.caption_column), but has"
    )
    assert found.problems[:4] == [
        "Row 1 of 'a.parquet' has no caption: write one or remove the row.",
        f"'b.parquet' {needs} URL (string), TEXT (string).",
        f"'c.parquet' {needs} image (string), text (string).",
        f"'d.parquet' {needs} image (binary), label (int64).",
    ]
    assert found.problems[4].startswith("'e.parquet' is not a readable parquet file (")


def test_data_sets_on_disk(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": data, "path": None} for data in (RED, GREEN)], "text": ["red", "green"]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": data.select([1]), "train": data}).save_to_disk(tmp_path / "split")
    padded = BLUE + b"\0"  # arrays of numpy would drop the last byte
    raw = datasets.Dataset.from_dict({"image": [padded], "caption": ["blue"]}).with_format("numpy")
    raw.save_to_disk(tmp_path / "raw")
    assert contents(open_records(tmp_path / "one")) == [("one row 0", "red", RED), ("one row 1", "green", GREEN)]
    assert [record.caption for record in open_records(tmp_path / "split")] == ["red", "green"]
    assert contents(open_records(tmp_path / "raw")) == [("raw row 0", "blue", padded)]


def test_problems_of_data_sets_on_disk(tmp_path):
    import datasets

    data = datasets.Dataset.from_dict({"image": ["a.png"], "text": ["red"]})
    data.save_to_disk(tmp_path / "paths")
    datasets.DatasetDict({"test": data, "validation": data}).save_to_disk(tmp_path / "split")
    write(tmp_path, {"broken/state.json": "{", "broken/dataset_info.json": "{"})
    assert scan(tmp_path / "paths").problems[0].endswith("but has image (string), text (string).")
    assert scan(tmp_path / "split").problems == [
        f"'{tmp_path / 'split'}' has no split 'train', only test, validation: name the folder of one of them."
    ]
    assert "is not a readable Hugging Face data set (" in scan(tmp_path / "broken").problems[0]


def test_without_the_package_for_tables_the_command_that_installs_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    write(tmp_path, {"a.parquet": b"x", "disk/state.json": "{}"})
    needed = "a package is needed that is not installed: run `pip install datasets`."
    assert scan(tmp_path / "a.parquet").problems == [f"To read 'a.parquet', {needed}"]
    assert scan(tmp_path / "disk").problems == [f"To read '{tmp_path / 'disk'}', {needed}"]


# Decoding


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_turned_upright(kind):
    picture = Image.new("RGB", (32, 16), "blue")
    picture.paste("red", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the left side is shown at the top
    buffer = io.BytesIO()
    picture.save(buffer, kind, exif=exif, quality=95)
    upright = decode(as_record(buffer.getvalue()))
    assert upright.size == picture_size("picture", buffer.getvalue()) == (16, 32)
    assert upright.getpixel((8, 4))[0] > 200
    assert upright.getpixel((8, 28))[2] > 200


def test_transparent_pictures_lie_on_white():
    half = encoded((255, 0, 0, 128), mode="RGBA")
    assert decode(as_record(half)).getpixel((2, 2)) == (255, 127, 127)
    clear = encoded((0, 0), mode="LA")
    assert decode(as_record(clear)).getpixel((2, 2)) == (255, 255, 255)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "red").quantize(4).save(buffer, "PNG", transparency=0)
    assert decode(as_record(buffer.getvalue())).getpixel((2, 2)) == (255, 255, 255)


def test_grey_pictures_keep_their_brightness():
    assert decode(as_record(encoded(77, mode="L"))).getpixel((2, 2)) == (77, 77, 77)
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 8), 77 * 257, np.uint16)).save(buffer, "PNG")
    assert decode(as_record(buffer.getvalue())).getpixel((2, 2)) == (77, 77, 77)


def noisy(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_truncated_pictures_are_broken(kind):
    data = noisy(kind)
    assert decode(as_record(data)).size == (64, 64)
    with pytest.raises(BadPicture) as caught:
        decode(as_record(data[: len(data) // 2]))
    assert caught.value.name == "picture"
    assert str(caught.value) == f"'picture' cannot be read: {caught.value.reason}."


def test_what_is_no_picture_is_broken(tmp_path):
    with pytest.raises(BadPicture, match=r"'picture' cannot be read: it is not a picture of a known format\."):
        decode(as_record(b"hello"))
    with pytest.raises(BadPicture, match="'picture' cannot be read: it is empty"):
        decode(as_record(b""))
    with pytest.raises(BadPicture, match="No such file"):
        decode(Record("gone", "", (tmp_path / "gone.png").read_bytes))


# Of many


def test_a_sample_of_many_shards_tells_about_all_of_them(tmp_path):
    for number in range(20):
        members = {f"{n}.{end}": content for n in range(3) for end, content in (("png", RED), ("txt", "red"))}
        write_shard(tmp_path / f"{number:02}.tar", {"orphan.txt": "nobody"} | members if number == 19 else members)
    found = scan(tmp_path, sample=True)
    assert (len(found.records), found.count) == (24, 60)
    assert found.notes[0].startswith("Looked into 8 of 20 files (00.tar, 02.tar, ")
    assert len(found.problems) == 1
    assert scan(tmp_path).count == 60


def test_a_fingerprint_changes_with_files_and_captions_alone(tmp_path):
    write(tmp_path, {"a.png": RED, "a.txt": "red", "b/c.png": BLUE, "b/c.txt": "blue"})
    before = fingerprint(tmp_path, "")
    assert before == fingerprint(str(tmp_path), "") != fingerprint(tmp_path, "text")
    write(tmp_path, {"b/c.txt": "blues"})
    changed = fingerprint(tmp_path, "")
    (tmp_path / "b" / "c.png").rename(tmp_path / "b" / "d.png")
    assert len({before, changed, fingerprint(tmp_path, "")}) == 3
    assert fingerprint(tmp_path / "none", "") == ""
