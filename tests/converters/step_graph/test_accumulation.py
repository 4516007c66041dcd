from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factored_step import FACTORS, SPEC, TRAINED, bases_of, batches, make_model, write_step
from helpers import CLASSES, SIZE, factors, make_bundle
from PIL import Image
from torch import nn

from wasi_export.artifact import Bundle, write_bundle_manifest
from wasi_export.converters.step_graph.function import StepSettings
from wasi_export.converters.step_graph.optimizers import Rates
from wasi_export.converters.training_step import export_training_step
from wasi_export.errors import ModelFailedError, UsageError
from wasi_export.image_set import ImageSet
from wasi_export.manifest import InputSpec
from wasi_export.runtimes.adapt import AdaptImages, AdaptOptions, adapt
from wasi_export.runtimes.adapter import Adapter
from wasi_export.runtimes.training_session import TrainingSession

KINDS = {
    "momentum": StepSettings(opt="momentum", recompute="none"),
    "wsi": StepSettings(
        opt="sgd",
        recompute="none",
        wsi=True,
        bases=bases_of(5, 6, 4),
        rates=dict.fromkeys(FACTORS, Rates(lr=3.0)),
    ),
    "adamw": StepSettings(opt="adamw", recompute="block"),
}
PARTS = ((3, 1, 4), (2,), (5, 5))
TOLERANCE = {
    "momentum": 1e-6,
    "wsi": 1e-6,
    "adamw": 1e-5,
}  # Adam divides by √v, near zero where a gradient is


def halves(kind):
    return replace(KINDS[kind], accumulate=True)


@cache
def exported(kind, in_halves):
    settings = halves(kind) if in_halves else KINDS[kind]
    return export_training_step(make_model(), SPEC, TRAINED, settings), settings


def open_kind(kind, folder, *, in_halves=True):
    step, settings = exported(kind, in_halves)
    return TrainingSession.load(folder, write_step(step, settings, folder))


def take(session, parts, *, seed, split=True):
    """Takes one step of parts, or of their union; returns what it tells."""
    data = batches(parts, seed)
    if not split:
        data = [tuple(torch.cat(tensors) for tensors in zip(*data, strict=True))]
    for place, (images, labels) in enumerate(data, 1):
        result = session.step(
            images.numpy(), labels.numpy(), lr=0.01, weight_decay=0.1, clip_norm=0.2, last=place == len(data)
        )
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_any_sizes_make_the_step_of_their_union(kind, tmp_path):
    whole = open_kind(kind, tmp_path / "whole", in_halves=False)
    split = open_kind(kind, tmp_path / "split")
    for seed, parts in enumerate(PARTS):
        expected = take(whole, parts, seed=seed, split=False)
        found = take(split, parts, seed=seed)
        assert found.loss == pytest.approx(expected.loss, abs=1e-6)
        assert found.correct == expected.correct
        assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
        assert expected.gradient_norm > 0.2  # so that it is clipped, and by the norm of the union
    assert whole.tensors().keys() == split.tensors().keys()
    for name, tensor in whole.tensors().items():
        limit = 2e-5 if "basis" in name else TOLERANCE[kind]  # of unit columns, by the condition of a moment
        np.testing.assert_allclose(split.tensors()[name], tensor, atol=limit, err_msg=name)


def test_parts_change_nothing_but_the_sums(tmp_path):
    session = open_kind("wsi", tmp_path)
    before = session.tensors()
    images, labels = batches([4])[0]
    result = session.step(images.numpy(), labels.numpy(), lr=0.1, last=False)
    assert result.gradient_norm is None
    assert result.is_finite
    after = session.tensors()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    assert after.keys() - before.keys() == set(session.facts.sums)
    assert after["images.sum"] == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_between_parts_goes_on_to_the_same_bits(kind, tmp_path):
    session = open_kind(kind, tmp_path / "one")
    other = open_kind(kind, tmp_path / "two")
    take(session, (3, 2), seed=0)
    first, second, third = batches((2, 3, 4), seed=1)
    session.step(first[0].numpy(), first[1].numpy(), lr=0.1, last=False)
    other.load_tensors(session.tensors())
    for part, last in ((second, False), (third, True)):
        images, labels = (tensor.numpy() for tensor in part)
        assert session.step(images, labels, lr=0.1, last=last) == other.step(
            images, labels, lr=0.1, last=last
        )
    for name, tensor in session.tensors().items():
        np.testing.assert_array_equal(other.tensors()[name], tensor)


def test_a_state_that_is_loaded_between_parts_begins_a_step(tmp_path):
    session = open_kind("momentum", tmp_path / "one")
    start = session.tensors()
    expected = take(session, (4,), seed=0)
    after = session.tensors()
    images, labels = batches([3], seed=5)[0]
    session.step(images.numpy(), labels.numpy(), lr=0.1, last=False)
    session.load_tensors(start)
    assert take(session, (4,), seed=0) == expected
    for name, tensor in after.items():
        np.testing.assert_array_equal(session.tensors()[name], tensor)


def test_after_a_part_that_failed_the_update_begins_anew(tmp_path):
    session, other = open_kind("momentum", tmp_path / "one"), open_kind("momentum", tmp_path / "two")
    images, labels = batches([3], seed=5)[0]
    session.step(images.numpy(), labels.numpy(), lr=0.1, last=False)
    with pytest.raises(ModelFailedError, match=r"failed on images \[3, 3, 7, 8\]"):
        session.step(images.numpy()[:, :, 1:], labels.numpy(), lr=0.1)
    assert take(session, (4,), seed=0) == take(other, (4,), seed=0)


def test_a_step_in_one_graph_takes_no_parts(tmp_path):
    session = open_kind("momentum", tmp_path, in_halves=False)
    images, labels = batches([3])[0]
    with pytest.raises(UsageError, match=r"export it again with adapt\.accumulate = true"):
        session.step(images.numpy(), labels.numpy(), lr=0.1, last=False)


class Brightness(nn.Module):
    """The model of `helpers.py` in torch."""

    def __init__(self) -> None:
        super().__init__()
        for name, array in factors().items():
            self.register_parameter(name, nn.Parameter(torch.from_numpy(array)))

    def forward(self, images):
        return F.linear(F.linear(images.flatten(1), self.right), self.left, self.bias)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle whose step is in two halves."""
    folder = make_bundle(tmp_path_factory.mktemp("bundle") / "bundle", training=True)
    manifest = Bundle.open(folder).manifest
    spec = InputSpec(height=SIZE, width=SIZE, mean=SPEC.mean, std=SPEC.std)
    step = export_training_step(Brightness(), spec, ("left", "right", "bias"), halves("momentum"))
    facts = write_step(step, halves("momentum"), folder)
    write_bundle_manifest(folder, manifest.model_copy(update={"training": facts}))
    return folder


OPTIONS = AdaptOptions(
    epochs=2, batch_size=7, micro_batch=3, lr=0.05, sched="cosine", warmup_steps=2, commit_every=2
)


def grey_images():
    """Dark and light images, 24 of them."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 24)
    levels = np.where(labels, 200, 50) + generator.integers(-40, 40, 24)
    return AdaptImages(
        ImageSet(CLASSES, 1 - labels, lambda i: Image.new("RGB", (6, 6), (int(levels[i]),) * 3), "grey")
    )


class Killed(BaseException):
    """What no code expects, as a process that is gone."""


def test_a_training_that_was_killed_between_parts_goes_on_to_the_same_bits(bundle, tmp_path):
    whole = Adapter.open(bundle)
    progress = adapt(whole, grey_images(), OPTIONS, tmp_path / "whole")
    assert progress.step == 8
    for stop in (2, 8, 12, 18):
        killed = Adapter.open(bundle)
        killed.session.step = die_after(stop, killed.session.step)
        with pytest.raises(Killed):
            adapt(killed, grey_images(), OPTIONS, tmp_path / f"{stop}")
        assert "images.sum" in killed.session.tensors()  # it was between two parts
        resumed = Adapter.open(bundle)
        assert adapt(resumed, grey_images(), OPTIONS, tmp_path / f"{stop}").step == 8
        for name, tensor in whole.session.tensors().items():
            np.testing.assert_array_equal(resumed.session.tensors()[name], tensor)


def die_after(count, step):
    """Returns the step of a session that ends the process after some calls."""
    left = [count]

    def run(*args, **kwargs):
        result = step(*args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return result

    return run


def test_micro_batches_train_as_whole_batches_do(bundle, tmp_path):
    split, whole = Adapter.open(bundle), Adapter.open(bundle)
    adapt(split, grey_images(), OPTIONS, tmp_path / "split")
    adapt(whole, grey_images(), OPTIONS.model_copy(update={"micro_batch": None}), tmp_path / "whole")
    start = Adapter.open(bundle).session.tensors()
    for name, tensor in whole.session.tensors().items():
        np.testing.assert_allclose(split.session.tensors()[name], tensor, atol=1e-6)
        assert np.abs(tensor - start[name]).max() > 1e-3


def test_an_adapter_takes_micro_batches(bundle):
    adapter, other = Adapter.open(bundle), Adapter.open(bundle)
    images = np.random.default_rng(0).standard_normal((5, 3, SIZE, SIZE)).astype(np.float32)
    labels = [0, 1, 1, 0, 1]
    loss = other.step(images, labels, lr=0.1)
    assert adapter.step(images, labels, lr=0.1, micro_batch=2) == pytest.approx(loss, abs=1e-6)
    for name, tensor in other.weights().items():
        np.testing.assert_allclose(adapter.weights()[name], tensor, atol=1e-6)


def test_a_bundle_that_was_not_made_for_it_says_how_to_make_it(learning_bundle, tmp_path):
    with pytest.raises(UsageError, match=r"export it again with adapt\.accumulate = true"):
        adapt(Adapter.open(learning_bundle), grey_images(), OPTIONS, tmp_path / "state")
