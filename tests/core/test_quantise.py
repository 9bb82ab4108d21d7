import pytest
import torch

from maskunet_core.files.quantise import pack, packed_size, unpack


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (1, 1)])
def test_values_come_back_within_half_a_step_and_with_their_sign(shape):
    torch.manual_seed(0)
    values = torch.randn(shape) * 2
    packed, step = pack(values)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_size(shape)
    back = unpack(packed, step, shape)
    assert (back - values).abs().max() <= step / 2 + 1e-6
    assert torch.equal(back > 0, values >= 0)


def test_packing_what_was_packed_changes_nothing():
    values = torch.randn(8, 8)
    once = unpack(*pack(values), (8, 8))
    assert torch.equal(unpack(*pack(once), (8, 8)), once)
