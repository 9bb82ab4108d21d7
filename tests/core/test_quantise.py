import pytest
import torch

from maskunet_core.masks import linear, quantise
from maskunet_core.masks.linear import MaskLogits
from maskunet_core.masks.quantise import PackedLogits, PackedMatrix, pack, packed_size


def packed_matrix(values: torch.Tensor) -> PackedMatrix:
    return PackedMatrix(*pack(values), tuple(values.shape))


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (1, 1)])
def test_values_come_back_within_half_a_step_and_with_their_sign(shape):
    torch.manual_seed(0)
    values = torch.randn(shape) * 2
    packed, step = pack(values)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_size(shape)
    back = PackedMatrix(packed, step, shape).whole()
    assert (back - values).abs().max() <= step / 2 + 1e-6
    assert torch.equal(back > 0, values >= 0)


def test_packing_what_was_packed_changes_nothing():
    once = packed_matrix(torch.randn(8, 8)).whole()
    assert torch.equal(packed_matrix(once).whole(), once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_value_is_its_level_times_the_step_and_then_rounded(dtype):
    torch.manual_seed(1)
    packed, step = pack(torch.randn(6, 10))
    levels = torch.stack([packed & 15, packed >> 4], dim=1).flatten()
    expected = ((levels.float() - 7.5) * step).reshape(6, 10).to(dtype)
    assert torch.equal(PackedMatrix(packed, step, (6, 10)).to(dtype).whole(), expected)


@pytest.mark.parametrize("columns", [4, 7])
def test_any_rows_can_be_unpacked_alone(columns):
    torch.manual_seed(2)
    matrix = packed_matrix(torch.randn(9, columns))
    whole = matrix.whole()
    for start in range(9):
        for stop in range(start + 1, 10):
            assert torch.equal(matrix.rows(start, stop), whole[start:stop])


@pytest.mark.parametrize("columns", [6, 7])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masks_of_packed_logits_are_those_of_unpacked_ones(monkeypatch, columns, rank, dtype):
    monkeypatch.setattr(linear, "BLOCK", 50)
    monkeypatch.setattr(quantise, "BLOCK", 50)
    torch.manual_seed(3)
    matrix = packed_matrix(torch.randn(11, columns)).to(dtype)
    terms = (torch.randn(2, 11, rank).to(dtype), torch.randn(columns, rank).to(dtype)) if rank else ()
    packed, plain = PackedLogits(matrix, *terms), MaskLogits(matrix.whole(), *terms)
    assert torch.equal(packed.full(), plain.full())
    for threshold in (0.0, 0.3):
        assert torch.equal(packed.above(threshold), plain.above(threshold))
        assert packed.above(threshold).shape == (2 if rank else 1, 11, columns)
        assert 0 < packed.above(threshold).float().mean() < 1
