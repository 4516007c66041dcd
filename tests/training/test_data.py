import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from wasi_export.image_set import ImageSet
from wasi_export.manifest import InputSpec
from wasi_export.training.data import Draw, EpochBatches, make_loader, random_numbers

SPEC = InputSpec(channels=1, height=16, width=16, mean=(0.5,), std=(0.5,))


@pytest.fixture
def augmented(tiny):
    return tiny("data.hflip=0.5").data


def global_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def global_draws():
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def batches_of(loader, epoch, start=0):
    loader.batch_sampler.go_to(epoch, start)
    return [(images.clone(), labels.clone()) for images, labels in loader]


def equal(some, others):
    return len(some) == len(others) and all(
        torch.equal(a, b) for pair in zip(some, others, strict=True) for a, b in zip(*pair, strict=True)
    )


@pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)  # fork, Python 3.12
def test_batches_are_the_same_for_any_number_of_workers(digits, augmented):
    alone, pair = (
        make_loader(digits[0], SPEC, augmented.model_copy(update={"workers": workers}), training=True, seed=3)
        for workers in (0, 2)
    )
    assert equal(batches_of(alone, epoch=1), batches_of(pair, epoch=1))


def test_an_epoch_can_be_entered_at_any_batch(digits, augmented):
    loader = make_loader(digits[0], SPEC, augmented, training=True, seed=3)
    assert equal(batches_of(loader, epoch=2)[3:], batches_of(loader, epoch=2, start=3))


def test_another_epoch_and_another_seed_are_other_batches(digits, augmented):
    loader = make_loader(digits[0], SPEC, augmented, training=True, seed=3)
    other = make_loader(digits[0], SPEC, augmented, training=True, seed=4)
    first = batches_of(loader, epoch=0)
    assert not equal(first, batches_of(loader, epoch=1))
    assert not equal(first, batches_of(other, epoch=0))


def test_one_image_is_augmented_differently_in_another_epoch(digits, augmented):
    data = make_loader(digits[0], SPEC, augmented, training=True, seed=3).dataset
    again, other = data[Draw(0, 5)][0], data[Draw(1, 5)][0]
    assert torch.equal(data[Draw(0, 5)][0], again)
    assert not torch.equal(other, again)


def test_without_augmentation_training_sees_what_evaluation_sees(digits, augmented):
    plain = augmented.model_copy(update={"augment": False})
    training = make_loader(digits[0], SPEC, plain, training=True).dataset
    evaluation = make_loader(digits[0], SPEC, plain, training=False).dataset
    assert torch.equal(training[Draw(0, 5)][0], evaluation[Draw(0, 5)][0])


def test_batches_leave_the_global_generators_alone(digits, augmented):
    loader = make_loader(digits[0], SPEC, augmented, training=True)
    before = global_states()
    batches_of(loader, epoch=0)
    assert global_states() == before


def test_numbers_drawn_inside_follow_from_the_seed():
    with random_numbers(1, 2):
        first = global_draws()
    with random_numbers(1, 2):
        assert global_draws() == first
    with random_numbers(1, 3):
        assert not set(global_draws()) & set(first)


def test_training_drops_a_last_batch_that_is_not_full_and_repeats_no_image():
    batches = list(EpochBatches(21, 8, seed=0, shuffle=True))
    assert [len(batch) for batch in batches] == [8, 8]
    assert len({draw.index for batch in batches for draw in batch}) == 16


def test_training_keeps_the_only_batch():
    assert [len(batch) for batch in EpochBatches(5, 8, seed=0, shuffle=True)] == [5]


def test_evaluation_takes_every_image_once_in_order():
    batches = list(EpochBatches(21, 8, seed=0, shuffle=False))
    assert [draw.index for batch in batches for draw in batch] == list(range(21))
    assert len(batches) == len(EpochBatches(21, 8, seed=0, shuffle=False)) == 3


def colour_set() -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)
    return ImageSet(("a", "b"), np.array([0, 1, 0]), lambda i: Image.fromarray(pixels[i]), "colours")


def test_evaluation_uses_the_transform_of_timm(tiny):
    spec = InputSpec(height=16, width=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), crop_pct=0.9)
    images, labels = next(iter(make_loader(colour_set(), spec, tiny().data, training=False)))
    transform = create_transform(
        (3, 16, 16), crop_pct=0.9, mean=spec.mean, std=spec.std, interpolation="bicubic", crop_mode="center"
    )
    expected = torch.stack([transform(colour_set()[i][0]) for i in range(3)])
    assert torch.equal(images, expected)
    assert labels.tolist() == [0, 1, 0]


def test_one_channel_reads_colour_images_as_grey(tiny):
    images, _ = next(iter(make_loader(colour_set(), SPEC, tiny().data, training=False)))
    assert images.shape == (3, 1, 16, 16)
