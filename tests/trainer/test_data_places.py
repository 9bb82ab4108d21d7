"""Data sets behind addresses that `fsspec` opens."""

import asyncio
import threading
import tracemalloc

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from maskunet_core.training.data import BadData
from tests.trainer.test_data_records import BLUE, GREEN, RED, contents, open_records, write, write_shard, write_table
from trainer.data.cache import Cache, Encoders, prepare
from trainer.data.listing import Listing
from trainer.data.places import is_address
from trainer.data.records import fingerprint, scan


def a_folder(path):
    write(path, {"a.png": RED, "a.txt": "red", "b/c.png": BLUE, ".hidden/d.png": GREEN})
    write(path, {"b/metadata.jsonl": [{"file_name": "c.png", "text": "blue"}]})


def some_shards(path):
    path.mkdir(exist_ok=True)
    for number in range(2):
        write_shard(path / f"{number}.tar", {"x.png": RED, "x.txt": "red", "y.png": BLUE, "y.json": '{"text": "blue"}'})


def a_table(path):
    path.mkdir()
    write_table(path / "train.parquet", {"image": [RED, GREEN], "text": ["red", "green"]})


def a_data_set(path):
    import datasets

    datasets.Dataset.from_dict({"image": [RED, BLUE], "text": ["red", "blue"]}).save_to_disk(str(path))


@pytest.fixture
def elsewhere():
    """Copies a folder into the memory's file system, and gives its address."""
    files = MemoryFileSystem()

    def copy(folder):
        files.put(f"{folder}/", "/bucket/set/", recursive=True)
        return "memory://bucket/set"

    files.store.clear()
    yield copy
    files.store.clear()


@pytest.fixture
def web_server(tmp_path):
    """The address of a web server of a folder."""
    from aiohttp import web

    loop, app = asyncio.new_event_loop(), web.Application()
    app.router.add_static("/set/", tmp_path, show_index=True)
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/set"
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.run_until_complete(runner.cleanup())
    loop.close()


def test_shards_are_read_from_a_web_server(tmp_path, web_server):
    some_shards(tmp_path)
    assert contents(open_records(web_server)) == contents(open_records(tmp_path))
    assert contents(open_records(f"{web_server}/1.tar")) == contents(open_records(tmp_path / "1.tar"))


@pytest.mark.parametrize("make", [a_folder, some_shards, a_data_set])
def test_a_data_set_may_lie_behind_an_address(tmp_path, elsewhere, make):
    folder = tmp_path / "set"
    folder.mkdir()
    make(folder)
    here = contents(open_records(folder))
    assert len(here) >= 2
    assert contents(open_records(f"file://{folder}")) == here
    assert contents(open_records(elsewhere(folder))) == here


def test_a_table_names_files_beside_it_behind_an_address_too(tmp_path, elsewhere):
    pictures = [{"bytes": RED, "path": None}, {"bytes": None, "path": "more/green"}]
    write_table(tmp_path / "train.parquet", {"image": pictures, "text": ["red", "green"]})
    write(tmp_path, {"more/green": GREEN})
    address = elsewhere(tmp_path)
    assert contents(open_records(f"{address}/train.parquet")) == [
        ("train.parquet row 0", "red", RED),
        ("train.parquet row 1", "green", GREEN),
    ]


def test_a_changed_file_behind_an_address_is_noticed(tmp_path, elsewhere):
    a_folder(tmp_path)
    address = elsewhere(tmp_path)
    before = fingerprint(address, "")
    assert before == fingerprint(address, "") != ""
    MemoryFileSystem().pipe("/bucket/set/a.txt", b"reds")
    assert fingerprint(address, "") != before
    assert fingerprint("memory://bucket/none", "") == ""


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("s3://bucket/set", "Install s3fs to access S3"),
        ("nowhere://bucket/set", "nowhere"),
        ("memory://bucket/none", "does not exist, or cannot be reached: name a folder of pictures"),
    ],
)
def test_an_address_that_cannot_be_opened_gets_a_sentence(address, reason):
    (problem,) = scan(address).problems
    assert reason in problem


@pytest.mark.parametrize("make", [a_folder, some_shards, a_table])
def test_a_network_that_fails_leaves_no_picture_out(tmp_path, elsewhere, monkeypatch, make):
    """It stops the run instead, which goes on from what is encoded."""
    make(tmp_path / "set")
    address = elsewhere(tmp_path / "set")
    encoders = Encoders([(8, 8)], lambda pixels: pixels, "vae", lambda caption: {"x": torch.zeros(1)}, "clip", False)
    records = open_records(address)

    def failing(*_, **__):
        raise ConnectionError("the line is down")

    with monkeypatch.context() as broken:
        broken.setattr(MemoryFileSystem, "_open", failing)
        with pytest.raises(BadData, match=r"^'memory://bucket.*the line is down.*start again; what is encoded is kept"):
            prepare(records, encoders, Cache(tmp_path / "cache"), broken_limit=1.0, progress=False)
    found = prepare(records, encoders, Cache(tmp_path / "cache"), broken_limit=0.0, progress=False)
    assert (len(found), found.skipped) == (len(records), [])


def test_a_drive_is_no_address():
    assert not any(map(is_address, ("C://pictures", "C:/pictures", "a folder/x", "")))
    assert all(map(is_address, ("s3://bucket", "simplecache::https://host/0.tar", "hf://datasets/a/b")))


def test_a_list_of_records_takes_little_more_than_its_letters():
    listing = Listing()
    reader = listing.reader(lambda offset, size: f"{offset} {size}".encode())
    tracemalloc.start()
    for number in range(10_000):
        listing.add(f"00001.tar/{number:08}.jpg", "a caption of thirty-two letters.", reader, (number, 7))
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    letters = 10_000 * (len("00001.tar/00000000.jpg") + 32)
    assert taken < 2 * letters + 10_000 * 8
    assert contents(listing[9_998:]) == contents([listing[-2], listing[9_999]])
    assert contents(listing[3:4]) == [("00001.tar/00000003.jpg", "a caption of thirty-two letters.", b"3 7")]
    with pytest.raises(IndexError):
        listing[10_000]
