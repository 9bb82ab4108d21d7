from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from maskunet_core.training.buckets import Epoch, Order, bucket_sizes, fit, nearest_bucket


def test_bucket_sizes_of_sd15():
    assert bucket_sizes(512) == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]


@pytest.mark.parametrize(
    ("resolution", "step", "limit"), [(1024, 64, 2.0), (768, 64, 3.0), (64, 8, 2.0), (100, 8, 1.5)]
)
def test_bucket_sizes_keep_their_bounds(resolution, step, limit):
    sizes = bucket_sizes(resolution, step, limit)
    assert len(set(sizes)) == len(sizes) > 2
    assert (resolution // step * step,) * 2 in sizes
    for width, height in sizes:
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        assert max(width, height) <= limit * min(width, height)
        assert (height, width) in sizes
        long, short = max(width, height), min(width, height)
        assert long == short or long * (short + step) > resolution**2


@pytest.mark.parametrize("resolution", [512, 540, 96])
def test_a_limit_of_one_leaves_the_square(resolution):
    assert bucket_sizes(resolution, limit=1.0) == [(resolution // 64 * 64,) * 2]


def test_a_resolution_below_the_step_is_refused():
    with pytest.raises(ValueError, match="A resolution of 32 is below the step of buckets, 64"):
        bucket_sizes(32)


def test_the_nearest_bucket_is_measured_in_ratios():
    sizes = [(256, 512), (512, 512), (512, 256)]
    assert nearest_bucket(100, 100, sizes) == (512, 512)
    assert nearest_bucket(4000, 1000, sizes) == (512, 256)
    assert nearest_bucket(1000, 4000, sizes) == (256, 512)
    # The turning point lies at the square root of 2, for tall and for wide pictures alike.
    assert nearest_bucket(1410, 1000, sizes) == nearest_bucket(1000, 1410, sizes) == (512, 512)
    assert (nearest_bucket(1420, 1000, sizes), nearest_bucket(1000, 1420, sizes)) == ((512, 256), (256, 512))
    assert nearest_bucket(3, 3, [(256, 256), (512, 512)]) == (512, 512)


def test_fit_shows_the_middle():
    image = Image.new("RGB", (90, 30), "blue")
    image.paste((255, 0, 0), (30, 0, 60, 30))
    fitted = fit(image, (60, 60))
    assert (tuple(fitted.shape), fitted.dtype, fitted.is_contiguous()) == ((3, 60, 60), torch.float32, True)
    torch.testing.assert_close(fitted[:, 8:-8, 8:-8], torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 44, 44))
    assert fit(image, (16, 24)).shape == (3, 24, 16)


def test_fit_keeps_the_whole_picture_of_the_same_ratio_without_aliasing():
    board = np.indices((128, 256)).sum(0) % 2 * 255
    image = Image.fromarray(board.astype(np.uint8)).convert("RGB")
    fitted = fit(image, (32, 16))
    torch.testing.assert_close(fitted, torch.full((3, 16, 32), 0.5), atol=0.03, rtol=0)


BUCKETS = [torch.arange(0, 10), torch.arange(10, 13), torch.arange(13, 21)]


def test_an_epoch_covers_every_row_in_batches_of_one_bucket():
    batches = Epoch(BUCKETS, 4, torch.Generator().manual_seed(0))
    assert len(batches) == 3 + 1 + 2
    members = [set(bucket.tolist()) for bucket in BUCKETS]
    for rows in batches:
        assert len(rows) == 4
        assert any(set(rows.tolist()) <= bucket for bucket in members)
    counts = Counter(row for rows in batches for row in rows.tolist())
    assert sorted(counts) == list(range(21))
    # Ten rows fill three batches with two more; three fill one with one more; eight fill two as they are.
    assert sorted(counts.values()) == [1] * 18 + [2] * 3
    assert all(counts[row] == 1 for row in range(13, 21))


@pytest.mark.parametrize("seed", range(20))
def test_a_batch_repeats_a_row_only_in_a_bucket_below_its_size(seed):
    batches = Epoch(BUCKETS, 4, torch.Generator().manual_seed(seed))
    for rows in batches:
        assert len(set(rows.tolist())) == (3 if rows[0] in BUCKETS[1] else 4)


def test_a_lonely_row_fills_its_batch():
    assert Epoch([torch.tensor([7])], 3, torch.Generator())[0].tolist() == [7, 7, 7]


def test_the_order_is_a_function_of_seed_and_step():
    order = Order(BUCKETS, 4, seed=5)
    steps = list(range(40))
    once = [order.rows(step).tolist() for step in steps]
    backwards = [order.rows(step).tolist() for step in reversed(steps)]
    assert backwards[::-1] == once
    assert [Order(BUCKETS, 4, seed=5).rows(step).tolist() for step in (17, 3, 39)] == [once[17], once[3], once[39]]
    assert [Order(BUCKETS, 4, seed=6).rows(step).tolist() for step in steps] != once


def test_every_epoch_is_shuffled_anew_and_complete():
    order = Order(BUCKETS, 4, seed=0)
    assert order.steps_per_epoch == 6
    epochs = [[order.rows(6 * epoch + step).tolist() for step in range(6)] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    for epoch in epochs:
        assert {row for rows in epoch for row in rows} == set(range(21))
