import torch
from sklearn.datasets import load_digits

from fusednn.app import data


def test_parts_hold_every_image_once_with_its_label():
    parts = data.load(seed=3)
    assert [len(part.targets) for part in parts] == [1437, 90, 270]
    pixels, labels = load_digits(return_X_y=True)
    expected = sorted((*image, label) for image, label in zip(pixels.tolist(), labels.tolist(), strict=True))
    dealt = sorted(
        (*image, label)
        for part in parts
        for image, label in zip((16 * part.inputs).tolist(), part.targets.tolist(), strict=True)
    )
    assert dealt == expected


def test_pixels_are_scaled_to_one():
    for inputs, targets in data.load(seed=0):
        assert inputs.dtype == torch.float32
        assert inputs.shape[1:] == (64,)
        assert inputs.min() == 0
        assert inputs.max() == 1
        assert targets.dtype == torch.int64


def test_every_digit_has_its_share_in_every_part():
    parts = data.load(seed=5)
    whole = sum(part.targets.bincount(minlength=10) for part in parts)
    for part, share in zip(parts, (16 / 20, 1 / 20, 3 / 20), strict=True):
        assert (part.targets.bincount(minlength=10) - share * whole).abs().max() <= 3


def test_seed_decides_the_split():
    once, again, other = (data.load(seed) for seed in (1, 1, 2**63 - 1))
    for part, same, different in zip(once, again, other, strict=True):
        assert torch.equal(part.inputs, same.inputs)
        assert torch.equal(part.targets, same.targets)
        assert not torch.equal(part.inputs, different.inputs)


def test_to_moves_both_tensors():
    moved = data.load(seed=0).test.to(torch.device("meta"))
    assert moved.inputs.is_meta
    assert moved.targets.is_meta
