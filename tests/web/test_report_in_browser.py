"""The page of a report in a headless Chromium: it fits wide and narrow windows, and asks for nothing."""

import base64
import io

import pytest
from PIL import Image
from report_inputs import CHECKS, make_answers, make_curve, make_latency, make_layer_times, make_report

from wasi_export.ranks import LayerPlan
from wasi_export.report_page import PageInputs, render_page
from wasi_export.report_page.inputs import Epoch, Stage, TrainingStep, figures_of

LONG = "a class with quite a long name"


@pytest.fixture
def page(tmp_path):
    """A page with every part, whose names are long."""
    answers = make_answers((LONG, f"another {LONG}"))
    Image.new("RGB", (8, 8)).save(file := io.BytesIO(), format="JPEG")
    uri = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    images = tuple(image.model_copy(update={"thumbnail": uri}) for image in answers["comparison"].images)
    answers["comparison"] = answers["comparison"].model_copy(update={"images": images})
    names = [f"blocks.{i}.mlp.fc1" for i in range(24)]
    report = make_report(
        *CHECKS, latency=(make_latency("baseline"), make_latency("bundle", 0.5), make_latency(LONG, 0.6)),
        layers=make_layer_times(*names), **answers,
    )  # fmt: skip
    layers = [
        LayerPlan(
            name=name,
            in_features=192,
            out_features=576,
            rank=56,
            method="sequential",
            energy=0.99,
            reason="r",
        )
        for name in names
    ]
    epochs = (Epoch(train_loss=1.0, val_loss=1.0, val_accuracy=0.5, seconds=1.0),) * 12
    inputs = PageInputs(
        reports=(report,), figures=figures_of(report), layers=layers, is_run=True,
        stages=(Stage(label="dense", series="dense", epochs=epochs),),
        steps=(
            TrainingStep(label="dense", series="dense", curve=make_curve(100)),
            TrainingStep(label="low-rank", series="own", curve=make_curve()),
        ),
    )  # fmt: skip
    path = tmp_path / "report.html"
    path.write_bytes(render_page(inputs))
    return path


def test_a_page_fits_every_window_and_asks_for_nothing(chromium, page):
    windows = chromium("open_report.mjs", page)
    assert [(shown["width"], shown["colorScheme"]) for shown in windows] == [
        (390, "light"), (390, "dark"), (1280, "light"), (1280, "dark"),
    ]  # fmt: skip
    for shown in windows:
        assert shown["faults"] == []
        assert shown["page"] == shown["width"]  # nothing to scroll sideways
        assert (shown["outside"], shown["cut"]) == ([], [])
        assert shown["letters"] >= 10  # pixels
        assert shown["pictures"] == 3
    light, dark, *_ = (shown["paper"] for shown in windows)
    assert light != dark
