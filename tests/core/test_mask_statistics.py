"""Statistics of masks that were made by hand, so that every number is known."""

import math

import pytest
import torch

from maskunet_core.models.structure import Block, Layer, Structure
from maskunet_core.records.recorded import EACH, IncompatibleMasks, RecordedMasks
from maskunet_core.records.statistics import ImageMasks, NoSuchImage, mask_statistics, to_table, weight_statistics
from maskunet_core.seam.layers import presented_weights

A, B, C = Layer("a", 2, 5), Layer("b", 1, 4), Layer("c", 1, 6)
SMALL = Structure("a small model", 16, (Block("up.0", "x", 8, (A, B)), Block("up.1", "y", 8, (C,))))


def removing(layer: Layer, *places: int) -> torch.Tensor:
    mask = torch.ones(1, layer.out_features * layer.in_features, dtype=torch.bool)
    mask[:, list(places)] = False
    return mask.view(1, layer.out_features, layer.in_features)


def recorded(steps: dict[float, dict[str, torch.Tensor]], **options) -> RecordedMasks:
    masks = RecordedMasks(SMALL, 1, **options)
    for sigma, step in steps.items():
        masks.add(sigma, step)
    return masks


@pytest.fixture
def masks():
    """Of a: 3, then 1 of these and 1 other, then none. Of b: always the same. Of c: nothing, ever."""
    same = {"b": removing(B, 3)}
    return recorded({1.0: same, 8.0: {"a": removing(A, 0, 1, 9), **same}, 4.0: {"a": removing(A, 0, 5), **same}})


def test_counts_are_those_of_the_masks_from_the_noisiest_step_on(masks):
    found = mask_statistics(ImageMasks(masks))
    assert found.sigmas == (8.0, 4.0, 1.0)
    assert found.layers == (A, B, C)
    assert found.blocks == ("up.0", "up.0", "up.1")
    assert found.weights.tolist() == [10, 4, 6]
    assert found.removed.tolist() == [[3, 2, 0], [1, 1, 1], [0, 0, 0]]
    assert found.flipped.tolist() == [[0, 3, 2], [0, 0, 0], [0, 0, 0]]
    assert found.differing is None


def test_shares_weigh_layers_by_their_size(masks):
    found = mask_statistics(ImageMasks(masks))
    assert found.share(found.removed)[:, 0].tolist() == pytest.approx([0.3, 0.25, 0.0])
    blocks = found.share_of_blocks(found.removed)
    assert list(blocks) == ["up.0", "up.1"]
    assert blocks["up.0"].tolist() == pytest.approx([4 / 14, 3 / 14, 1 / 14])
    assert blocks["up.1"].tolist() == [0.0, 0.0, 0.0]
    assert found.share_of_all(found.removed).tolist() == pytest.approx([0.2, 0.15, 0.05])


def test_two_recordings_differ_where_just_one_keeps_a_weight(masks):
    other = recorded({8.0: {"a": removing(A, 0, 2)}, 0.5: {"a": removing(A, 9), "b": removing(B, 3)}})
    found = mask_statistics(ImageMasks(masks), ImageMasks(other))
    # At 4.0 the nearest step of the other is 8.0, at 1.0 it is 0.5.
    assert found.differing.tolist() == [[3, 2, 1], [1, 1, 0], [0, 0, 0]]
    assert mask_statistics(ImageMasks(masks), ImageMasks(masks)).differing.sum() == 0


def test_images_and_branches_have_their_own_numbers():
    rows = torch.cat([removing(C, *range(count)) for count in (1, 2, 3, 4)])
    masks = RecordedMasks(SMALL, 2, branches=EACH)
    masks.add(1.0, {"c": rows})
    counts = {
        (branch, image): int(mask_statistics(ImageMasks(masks, image, branch)).removed[2, 0])
        for branch in ("positive", "negative")
        for image in (0, 1)
    }
    assert counts == {("positive", 0): 1, ("positive", 1): 2, ("negative", 0): 3, ("negative", 1): 4}


@pytest.mark.parametrize(("branches", "removed"), [("both", 2), ("positive", 0)])
def test_the_negative_branch_of_shared_masks(branches, removed):
    masks = recorded({1.0: {"c": removing(C, 0, 1)}}, branches=branches)
    assert mask_statistics(ImageMasks(masks, 0, "negative")).removed[2, 0] == removed


@pytest.mark.parametrize("image", [-1, 2])
def test_an_image_that_is_not_there_gets_a_sentence(image):
    masks = RecordedMasks(SMALL, 2)
    sentence = f"There is no image {image} in 'other_masks': .* batch of 2. Its images have the numbers 0 to 1"
    with pytest.raises(NoSuchImage, match=sentence):
        ImageMasks(masks, image, name="other_masks")


def test_masks_of_another_family_or_without_steps_are_not_compared(masks, toy_structure):
    foreign = RecordedMasks(toy_structure, 1)
    foreign.add(1.0, {})
    with pytest.raises(IncompatibleMasks, match=r"on a small model .* on the MaskUNet toy .* cannot be compared"):
        mask_statistics(ImageMasks(masks), ImageMasks(foreign))
    with pytest.raises(IncompatibleMasks, match="'other_masks' hold no step"):
        mask_statistics(ImageMasks(masks), ImageMasks(recorded({})))
    with pytest.raises(IncompatibleMasks, match="hold no step"):
        mask_statistics(ImageMasks(recorded({})))


WEIGHTS = {
    "a": torch.tensor([[-10.0, 1, 1, 1, 1], [1, 1, 1, 1, -0.1]]),
    "b": torch.full((1, 4), 0.1),
    "c": torch.zeros(1, 6),
}


def test_magnitudes_of_what_is_kept_and_removed(masks):
    found = weight_statistics(ImageMasks(masks), WEIGHTS.__getitem__)
    assert found.mean_removed[0, 0] == pytest.approx((10 + 1 + 0.1) / 3)
    assert found.mean_kept[0, 0] == pytest.approx(1)
    assert found.mean_removed[0, 1] == pytest.approx((10 + 1) / 2)
    assert math.isnan(found.mean_removed[0, 2])
    assert found.mean_kept[0, 2] == pytest.approx((10 + 8 + 0.1) / 10)
    assert found.mean_removed[1].tolist() == pytest.approx([0.1] * 3)
    assert found.mean_kept[2].tolist() == [0.0, 0.0, 0.0]


class OfADeviceWithoutDouble(torch.Tensor):
    """A tensor that refuses double precision, as those of Apple's GPUs do, until it is brought to the CPU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if function is torch.Tensor.cpu:
            return result.as_subclass(torch.Tensor)
        if isinstance(result, cls) and result.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return result


def test_weights_on_a_device_without_double_precision_have_the_same_statistics(masks):
    on_cpu = weight_statistics(ImageMasks(masks), WEIGHTS.__getitem__)
    there = weight_statistics(ImageMasks(masks), lambda layer: WEIGHTS[layer].as_subclass(OfADeviceWithoutDouble))
    for name in ("edges", "kept", "removed", "mean_kept", "mean_removed"):
        torch.testing.assert_close(getattr(there, name), getattr(on_cpu, name), rtol=0, atol=0, equal_nan=True)
    with pytest.raises(TypeError, match="no float64"):
        WEIGHTS["a"].as_subclass(OfADeviceWithoutDouble).sum(dtype=torch.float64)


def test_many_removals_of_many_weights_are_counted_exactly():
    """One bin of a layer as large as SDXL's, over many steps: more than fp32 counts."""
    layer = Layer("large", 4096, 2048)
    structure = Structure("a model", 16, (Block("up.0", "x", 8, (layer,)),))
    masks = RecordedMasks(structure, 1)
    nothing = torch.zeros(1, 4096, 2048, dtype=torch.bool)
    for step in range(3):
        masks.add(1.0 + step, {"large": nothing})
    found = weight_statistics(ImageMasks(masks), lambda _: torch.full((4096, 2048), 0.1))
    assert float(found.removed.sum()) == 4096 * 2048
    assert float(found.kept.abs().sum()) == 0.0
    assert found.mean_removed.tolist()[0] == pytest.approx([0.1] * 3, rel=1e-6)


def test_histograms_count_every_weight_once_at_its_magnitude(masks):
    found = weight_statistics(ImageMasks(masks), WEIGHTS.__getitem__)
    assert found.edges[[0, -1]].tolist() == pytest.approx([1e-3, 10])

    def inside(counts, low, high):
        return float(counts[(found.edges[1:] > low) & (found.edges[:-1] < high)].sum())

    # Per step: the 10 is removed at two of three steps, of the ones 1 and 1, of the tenths 2, 1 and 1.
    assert found.kept.sum() + found.removed.sum() == pytest.approx(20)
    assert inside(found.removed, 9, 11) == pytest.approx(2 / 3)
    assert inside(found.removed, 0.9, 1.1) == pytest.approx(2 / 3)
    assert inside(found.removed, 0.09, 0.11) == pytest.approx(4 / 3)
    assert inside(found.kept, 0.9, 1.1) == pytest.approx(8 - 2 / 3)
    assert found.kept[0] == 6
    assert found.removed[0] == 0


def test_the_table_has_a_line_per_layer_and_step(masks):
    one = ImageMasks(masks)
    table = to_table(mask_statistics(one, one), weight_statistics(one, WEIGHTS.__getitem__))
    lines = [[cell.strip() for cell in line.split("\t")] for line in table.splitlines()]
    assert len(lines) == 1 + 3 * 3
    rows = [dict(zip(lines[0], line)) for line in lines[1:]]
    assert rows[0] == {
        "step": "1",
        "sigma": "8.0000",
        "block": "up.0",
        "layer": "up.0.0 a",
        "weights": "10",
        "removed": "3",
        "keep_ratio": "0.700000",
        "flipped": "",
        "differing": "0.000000",
        "mean_kept": "1.000000",
        "mean_removed": "3.700000",
    }
    assert (rows[3]["step"], rows[3]["flipped"]) == ("2", "0.300000")
    assert (rows[8]["layer"], rows[8]["keep_ratio"], rows[8]["mean_removed"]) == ("up.1.0 c", "1.000000", "")
    alone = to_table(mask_statistics(one), weight_statistics(one, WEIGHTS.__getitem__)).splitlines()[1]
    assert alone.split("\t")[lines[0].index("differing")].strip() == ""


def test_weights_are_those_that_the_host_presents(toy):
    """With a LoRA merged in; and looking at them changes nothing."""
    import comfy.sd

    model, clip, _ = toy
    name = "output_blocks.3.1.transformer_blocks.0.attn2.to_q"
    stock = model.model.diffusion_model.get_submodule(name).weight.detach().clone()
    stream = torch.Generator().manual_seed(0)
    up, down = (torch.randn(shape, generator=stream) for shape in ((128, 2), (2, 128)))
    layers = {name: Layer(name, 128, 128)}
    prefix = "lora_unet_" + name.replace(".", "_")
    file = {f"{prefix}.lora_up.weight": up, f"{prefix}.lora_down.weight": down, f"{prefix}.alpha": torch.tensor(2.0)}
    patched, _ = comfy.sd.load_lora_for_models(model, clip, file, 0.5, 0.0)
    torch.testing.assert_close(presented_weights(patched, layers)(name), stock.float() + 0.5 * up @ down)
    weight = presented_weights(model, layers)(name)
    assert torch.equal(weight, stock.float())
    weight.zero_()
    assert torch.equal(presented_weights(model, layers)(name), stock.float())
