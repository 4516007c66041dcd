"""The page of a report: what is on it and what is not, hostile names, and marks at the right places."""

import itertools
import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
from report_inputs import (
    CHECKS,
    make_answers,
    make_board_report,
    make_curve,
    make_latency,
    make_layer_times,
    make_report,
)

from wasi_export.ranks import LayerPlan
from wasi_export.report import ChangedImage, Check, Confusion, Predictions
from wasi_export.report_page import PageInputs, render_page
from wasi_export.report_page.answers import LEVELS, answers_of, matrix_chart
from wasi_export.report_page.curves import curves_chart
from wasi_export.report_page.inputs import Epoch, ModelFigures, Stage, TrainingStep, figures_of
from wasi_export.report_page.latency import latency_chart, ratio_chart
from wasi_export.report_page.layers import group_layers, layer_chart
from wasi_export.report_page.memory import at_peak, step_chart
from wasi_export.report_page.quantities import points
from wasi_export.report_page.svg import Scale
from wasi_export.report_page.tradeoff import LETTER, Limits, tradeoff_chart

HOSTILE = "</title><script>alert(1)</script><img src=http://x/y onerror=a> \"'&\x1b[31m\u202eevil"
VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Reads a page; tags must close in the order in which they were opened."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self.feed(page.decode())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def inputs_of(*reports, **more) -> PageInputs:
    return PageInputs(reports=reports, figures=figures_of(reports[0]), **more)


def full_report():
    latency = (make_latency("baseline"), make_latency("bundle", 0.5), make_latency("bundle, int8", 0.4))
    return make_report(*CHECKS, latency=latency)


def layer(name, *, rank=56, energy=0.99, **more) -> LayerPlan:
    method = None if rank is None else "sequential"
    return LayerPlan(
        name=name, in_features=192, out_features=576, rank=rank, method=method, energy=energy, reason="r",
        **more,
    )  # fmt: skip


def drawn(markup: str) -> ET.Element:
    return ET.fromstring(markup)


def marks(markup: str, tag: str, css: str) -> list[dict[str, str]]:
    return [element.attrib for element in drawn(markup).iter(tag) if element.get("class") == css]


def test_a_report_with_checks_alone_has_no_section_for_what_was_not_measured():
    page = Page(render_page(inputs_of(make_report(CHECKS[0], CHECKS[4]))))
    assert page.headings == ["model.onnx", "parity error", "Checks", "Where it was measured", "Not measured"]
    assert not [tag for tag, _ in page.tags if tag == "svg"]
    assert "Passed 2 passed" in page.text
    assert "accuracy: wasi-export validate BUNDLE --data IMAGES" in page.text
    assert "latency beside the dense model: wasi-export validate BUNDLE --baseline DENSE_BUNDLE" in page.text


def test_checks_are_shown_with_thresholds_their_sides_and_their_evidence():
    text = Page(render_page(inputs_of(full_report()))).text
    assert "parity error ✓ passed 4e-07 ≤ 1e-05 device largest 4e-07" in text
    assert "accuracy ✓ passed 0.97 ≥ 0.9 device 97 of 100" in text
    assert "size ✓ passed 2.5 MB ≤ 5 MB device" in text


def test_the_models_are_compared_with_the_dense_one():
    page = Page(render_page(inputs_of(full_report())))
    assert {"Latency", "Accuracy over latency", "Size and memory"} <= set(page.headings)
    assert "97.00 % +1.00 points on baseline ✓ passed, ≥ 90 %, drop ≤ 3 points" in page.text
    assert "0.50 ms 0.500 of baseline ✓ passed, ≤ 0.95 of baseline" in page.text
    assert "bundle, int8 95.00 −1.00 0.40 p99 0.60 0.400 0.380–0.420" in page.text


@pytest.mark.parametrize(
    ("checks", "mark", "verdict"),
    [
        ((Check(name="size", status="failed", value=9, threshold=5),), "✕", "Failed: size 1 failed"),
        (
            (Check(name="accuracy", status="no data", threshold=0.9),),
            "?",
            "Nothing to check for: accuracy 1 without data",
        ),
        ((Check(name="size", status="info", value=9),), "?", "Nothing was checked 1 for information"),
        (
            (Check(name="latency ratio", status="undecided", value=0.9, threshold=0.9),),
            "≈",
            "Undecided: latency ratio 1 undecided",
        ),
    ],
)
def test_the_verdict_is_first(checks, mark, verdict):
    text = Page(render_page(inputs_of(make_report(*checks)))).text
    head = text[text.index(f"{mark} m") :]
    assert head.startswith(f"{mark} m {verdict}")


def test_one_page_has_all_machines_and_the_worst_verdict():
    failed = make_report(Check(name="size", status="failed", value=9, threshold=5))
    other = make_board_report().model_copy(update={"model_sha256": "1" * 64})
    page = Page(render_page(inputs_of(failed, other)))
    assert "✕ m ✕ this machine failed: size ✓ arm64:pi5 passed" in page.text
    assert "Instructions, arm64:pi5" in page.headings
    assert "another model.onnx than that of the first machine" in page.text


def test_counted_instructions_are_told_from_the_estimate():
    text = Page(render_page(inputs_of(make_board_report()))).text
    assert "instructions 4.9 M of one run, emulated" in text
    assert "estimate, Raspberry Pi 5 0.72–0.92 ms not measured; one thread" in text
    assert "latency beside the dense model" not in text  # an emulated board has none


def step(label="dense", scale=1) -> TrainingStep:
    return TrainingStep(label=label, series="dense", curve=make_curve(scale))


def hostile_inputs() -> PageInputs:
    check = Check(name=HOSTILE, status="failed", value=1, threshold=0, unit=HOSTILE, detail=HOSTILE)
    host = make_report().host.model_copy(update={"machine": HOSTILE, "versions": {HOSTILE: HOSTILE}})
    names = ("baseline", "bundle", HOSTILE)
    answers = make_answers((HOSTILE, "b"))
    images = (ChangedImage(image=HOSTILE, label=0, baseline=7, bundle=1),)
    report = make_report(
        *CHECKS, check, Check(name=f"accuracy of {HOSTILE}", status="info", value=0.5),
        latency=tuple(map(make_latency, names)), model=HOSTILE, bundle=HOSTILE, target=HOSTILE, host=host,
        layers=make_layer_times(HOSTILE),
        **answers | {"comparison": answers["comparison"].model_copy(update={"images": images})},
    )  # fmt: skip
    layers = (layer(f"{HOSTILE}.0"), layer(HOSTILE, rank=None).model_copy(update={"reason": HOSTILE}))
    stage = Stage(label=HOSTILE, series="own", epochs=(epoch(),))
    return inputs_of(
        report, make_board_report(), layers=layers, stages=(stage,), steps=(step(HOSTILE), step()),
        facts={HOSTILE: HOSTILE}, is_run=True,
    )  # fmt: skip


def test_hostile_names_are_text():
    page = render_page(hostile_inputs())
    read = Page(page)
    assert "script" not in {tag for tag, _ in read.tags}
    assert not [attrs for _, attrs in read.tags if "onerror" in attrs or "src" in attrs]
    assert len([word for word in read.words if HOSTILE[:40] in word]) > 15
    assert "<script>alert(1)</script>" in read.text
    assert b"\x1b" not in page
    assert "\u202e" not in page.decode()


@pytest.mark.parametrize(
    "inputs", [hostile_inputs, lambda: inputs_of(full_report().model_copy(update=make_answers()))]
)
def test_nothing_is_loaded_and_the_drawings_are_xml(inputs):
    page = render_page(inputs()).decode()
    tags = Page(page.encode()).tags
    names = {(tag, name) for tag, attributes in tags for name in attributes}
    loading = {"href", "src", "srcset", "action", "data", "xlink:href", "poster", "background"}
    assert {(tag, name) for tag, name in names if name in loading} <= {("img", "src")}
    assert all(attrs["src"].startswith("data:image/jpeg;base64,") for tag, attrs in tags if tag == "img")
    assert {"script", "link", "iframe", "object", "base"}.isdisjoint(tag for tag, _ in tags)
    style = page[page.index("<style>") : page.index("</style>")]
    assert not re.search(r"url\(|@import|https?:", style)
    assert "default-src 'none'" in page
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert drawings
    identifiers = []
    for drawing in drawings:
        root = drawn(drawing)
        title, description = root[0], root[1]
        assert (title.tag, description.tag) == ("title", "desc")
        assert title.text
        assert description.text
        assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        identifiers.append(title.get("id"))
    assert len(set(identifiers)) == len(identifiers)


def test_the_same_inputs_give_the_same_bytes():
    assert render_page(hostile_inputs()) == render_page(hostile_inputs())


def test_a_scale_places_its_ends_and_clamps_the_rest():
    scale = Scale(0.0, 2.0, 10.0, 110.0)
    assert [scale(value) for value in (-1, 0, 1, 2, 9, float("nan"), float("inf"))] == [
        10, 10, 60, 110, 110, 10, 110,
    ]  # fmt: skip
    assert scale.ticks(4) == (0.0, 0.5, 1.0, 1.5, 2.0)
    assert Scale(1.0, 1.0, 0.0, 1.0)(1.0) == 0.0


@pytest.mark.parametrize("end", [float("inf"), float("nan")])
def test_a_scale_without_an_end_has_no_ticks(end):
    assert Scale(0.0, end, 0.0, 1.0).ticks() == ()


def test_the_heights_of_a_histogram_are_the_shares_of_the_samples():
    markup, remark = latency_chart("k", figures_of(make_report(latency=(make_latency("bundle"),))))
    bars = marks(markup, "rect", "s-own")
    heights = [float(bar["height"]) for bar in bars]
    assert heights == [15.0, 30.0, 15.0]  # 0.9, twice 1.0, and 1.5; 9.0 is beyond
    assert remark == "1 of the samples lies beyond the axis."


def test_thresholds_against_the_dense_model_become_a_field():
    report = full_report()
    limits = Limits.of(report, figures_of(report))
    assert limits == Limits(accuracy=pytest.approx(0.93), latency_ms=0.95)
    strict = make_report(CHECKS[1].model_copy(update={"threshold": 0.95}))
    assert Limits.of(strict, figures_of(strict)) == Limits(accuracy=0.95, latency_ms=None)


def test_labels_of_near_points_do_not_cover_one_another():
    models = [
        ModelFigures(name=name, label=name, accuracy=0.9, latency=make_latency(name, 1 + index / 50))
        for index, name in enumerate(("model a", "model b", "model c", "model d"))
    ]
    boxes = []
    for label in marks(tradeoff_chart("k", models, Limits(None, None)), "text", "name"):
        wide, tall = 7 * LETTER, 12
        left = float(label["x"]) - wide * {"start": 0, "middle": 0.5, "end": 1}[label["text-anchor"]]
        boxes.append((left, float(label["y"]) - tall, left + wide, float(label["y"])))
    assert len(boxes) == 4
    for (left, top, right, bottom), (a, b, c, d) in itertools.combinations(boxes, 2):
        assert right <= a or c <= left or bottom <= b or d <= top


def epoch(accuracy=0.5, loss: float | None = 1.0) -> Epoch:
    return Epoch(train_loss=loss, val_loss=loss, val_accuracy=accuracy, seconds=1.0)


def test_a_stage_begins_after_the_one_before_it():
    stages = [
        Stage(label="dense", series="dense", epochs=(epoch(0.1), epoch(0.8))),
        Stage(label="low-rank", series="own", epochs=(epoch(0.7), epoch(0.9))),
    ]
    markup = curves_chart("k", stages)
    dense, own = (marks(markup, "circle", css) for css in ("s-dense", "s-own"))
    across = [float(dot["cx"]) for dot in (*dense[:2], *own[:2])]
    assert across == sorted(across)
    assert len(set(across)) == 4
    assert float(own[1]["cy"]) < float(dense[1]["cy"]) < float(own[0]["cy"]) < float(dense[0]["cy"])


def test_a_loss_that_was_not_finite_is_left_out():
    stage = Stage(label="dense", series="dense", epochs=(epoch(loss=None), epoch(loss=2.0)))
    accuracy, loss, _ = drawn(curves_chart("k", [stage])).iter("polyline")
    assert len(accuracy.get("points").split()) == 2
    assert len(loss.get("points").split()) == 1


def test_layers_are_grouped_by_what_is_not_a_number():
    layers = [
        layer("patch_embed.proj", rank=None, energy=None),
        *(layer(f"blocks.{i}.{part}", rank=None if (i, part) == (1, "fc1") else 56) for i in (0, 1)
          for part in ("qkv", "fc1")),
    ]  # fmt: skip
    groups = group_layers(layers)
    assert [(group.pattern, group.numbers) for group in groups] == [
        ("blocks.*.qkv", ("0", "1")), ("blocks.*.fc1", ("0", "1")),
    ]  # fmt: skip
    assert groups[0].shape == "192 → 576"


def test_a_layer_is_drawn_with_its_rank_break_even_and_energy_in_nines():
    layers = [
        layer("a.0", rank=72, energy=0.99),
        layer("a.1", rank=36, energy=0.999),
        layer("a.2", rank=None),
    ]
    markup = layer_chart("k", group_layers(layers)[0], layers, {})
    assert len(marks(markup, "rect", "ghost")) == 3
    first, second = (float(bar["height"]) for bar in marks(markup, "rect", "s-own"))
    assert first == pytest.approx(2 * second, abs=0.1)
    ghost = float(marks(markup, "rect", "ghost")[0]["height"])
    assert ghost == pytest.approx(2 * first, abs=0.1)  # 144 is the break-even rank
    low, high = (float(dot["cy"]) for dot in marks(markup, "circle", "s-own"))
    assert high < low


def test_the_time_of_layers_is_shown_where_it_was_measured():
    layers = [layer("a.0"), layer("a.1")]
    timed = make_layer_times("a.0")
    markup = layer_chart("k", group_layers(layers)[0], layers, {"a.0": timed[0]})
    (dense,) = marks(markup, "circle", "s-dense")
    energies_and_time = [float(dot["cy"]) for dot in marks(markup, "circle", "s-own")]
    assert len(energies_and_time) == 3
    assert max(energies_and_time) > float(dense["cy"])  # 0.1 ms lies below 0.2
    assert not marks(layer_chart("k", group_layers(layers)[0], layers, {}), "circle", "s-dense")


def test_the_time_of_all_layers_is_told_beside_that_of_the_dense_ones():
    report = full_report().model_copy(update={"layers": make_layer_times("a.0", "a.1", "other")})
    text = Page(render_page(inputs_of(report, layers=(layer("a.0"), layer("a.1"))))).text
    assert "together they take 0.20 ms, dense 0.40 ms" in text
    assert "a.0 192 576 56 99.0000 % 43,008 0.389 0.100 0.200 r" in text


def test_a_report_without_the_plan_of_its_layers_has_their_times_as_a_table():
    report = full_report().model_copy(update={"layers": make_layer_times("a.0")})
    text = Page(render_page(inputs_of(report))).text
    assert "layer baseline ms bundle ms ratio a.0 0.200 0.100 0.500 all else 0.500 0.600 1.200" in text


def test_the_ratio_of_latencies_is_drawn_with_its_interval_beside_the_noise():
    models = figures_of(full_report())
    markup = ratio_chart("k", models, 0.9)
    low, high, *_ = (float(line["x1"]) for line in marks(markup, "line", "whisker s-own")[1:])
    (dot,) = marks(markup, "circle", "s-own")
    assert low < float(dot["cx"]) < high
    unit = (high - low) / 0.05  # its interval is 0.475 to 0.525
    (noise,) = marks(markup, "rect", "noise")
    assert float(noise["width"]) == pytest.approx(0.1 * unit, rel=0.05)
    (limit,) = marks(markup, "line", "limit")
    assert float(limit["x1"]) == pytest.approx(float(dot["cx"]) + 0.4 * unit, rel=0.02)
    assert ratio_chart("k", models[:1], None) == ""


def test_memory_is_stacked_and_its_peak_is_marked():
    steps = [step(scale=2), step("low-rank")]
    markup = step_chart("k", steps[1], steps)
    (peak,) = marks(markup, "circle", "peak")
    areas = [area.get("points").split() for area in drawn(markup).iter("polygon")]
    assert len(areas) == 5
    tops = [min(float(point.split(",")[1]) for point in area) for area in areas]
    assert tops == sorted(tops, reverse=True)
    assert float(peak["cy"]) == tops[-1]
    higher = marks(step_chart("k", steps[0], steps), "circle", "peak")[0]
    assert float(higher["cy"]) < float(peak["cy"])  # on one axis
    text = " ".join(drawn(markup).itertext())
    assert "peak 9.0\u00a0MB" in text
    assert "9.0 MB at most, in backward: parameters 1.0, optimizer state 2.0, gradients 1.0" in text
    assert [name for name in ("forward", "backward", "update") if name in text.split()] == [
        "forward", "backward", "update",
    ]  # fmt: skip


def test_what_memory_is_at_the_peak_is_a_table():
    rows = {row.label: row.cells for row in at_peak([step(scale=2), step()])}
    assert rows["activations and workspace"] == ("10.0", "5.0")
    assert rows["all"] == ("18.0", "9.0")


def matrix(size, wrong=1):
    return tuple(tuple(9 if i == j else wrong for j in range(size)) for i in range(size))


def predictions(size, **changes) -> tuple[Predictions, ...]:
    found = Predictions(
        model="bundle", correct=9, total=100, matrix=matrix(size),
        confusions=(Confusion(label=1, answer=0, images=7), Confusion(label=0, answer=1, images=5)),
    )  # fmt: skip
    return tuple(found.model_copy(update={"model": name} | changes) for name in ("baseline", "bundle"))


def test_a_confusion_is_the_darker_the_more_images_it_has():
    cells = ((9, 10, 1), (0, 9, 4), (0, 0, 9))
    markup = matrix_chart("k", "dense", cells, ("a", "b", "c"), most=20)
    shades = [rect.get("class").split()[1] for rect in drawn(markup).iter("rect")]
    assert shades == [
        "right", "wrong-3", "wrong-1", "wrong-0", "right", "wrong-1", "wrong-0", "wrong-0", "right",
    ]  # fmt: skip
    assert {text for text in drawn(markup).itertext() if text.isdecimal()} == {"9", "10", "1", "4"}
    assert f"wrong-{LEVELS}" in matrix_chart("k", "dense", cells, ("a", "b", "c"), most=10)


def test_the_squares_of_a_matrix_do_not_leave_the_drawing():
    for names in (("a", "b"), tuple(f"a long name of class {i}" for i in range(30))):
        root = drawn(matrix_chart("k", "dense", matrix(len(names)), names, most=1))
        _, _, wide, tall = map(float, root.get("viewBox").split())
        for rect in root.iter("rect"):
            assert float(rect.get("x")) + float(rect.get("width")) <= wide
            assert float(rect.get("y")) + float(rect.get("height")) <= tall


@pytest.mark.parametrize(
    ("classes", "changes", "drawings", "images"),
    [
        (30, {}, 2, 1),
        (31, {}, 0, 1),
        (1000, {"matrix": None}, 0, 7),
        (3, {"matrix": ((1, 2), (3,))}, 0, 3),  # not what we write
    ],
)
def test_many_classes_have_their_confusions_as_a_table_alone(classes, changes, drawings, images):
    names = tuple(map(str, range(classes)))
    report = make_report(classes=names, predictions=predictions(min(classes, 50), **changes))
    answers = answers_of("k", report, {"baseline": "dense"})
    assert answers is not None
    assert len(answers.matrices) == drawings
    assert answers.labels == ("dense", "bundle")
    first = answers.confused[0]
    assert (first.label, first.answer, first.images) == ("1", "0", (images, images))


def test_what_became_of_the_answers_is_told_image_by_image():
    report = full_report().model_copy(update=make_answers())
    page = Page(render_page(inputs_of(report)))
    assert "baseline right 90 4, lost baseline wrong 5, won 1" in page.text
    assert "+1.00 points, 95 % confidence interval −5.00 to +7.00; McNemar's exact test: p = 1" in page.text
    assert "9 images with another answer a.jpg class cat baseline cat ✓ bundle dog" in page.text
    assert "dog/c.jpg dog cat – wrong both times" in page.text
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 1
    assert "cat dog 4 3 dog cat 2 2" in page.text  # confused most often


@pytest.mark.parametrize(("value", "text"), [(0.0084, "+0.84"), (-0.01, "−1.00"), (-0.00001, "±0.00")])
def test_points_have_a_sign(value, text):
    assert points(value) == text
