"""The page of a report: what is on it and what is not, hostile names, and marks at the right places."""

import itertools
import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
from report_inputs import CHECKS, make_board_report, make_latency, make_report

from wasi_export.ranks import LayerPlan
from wasi_export.report import Check
from wasi_export.report_page import PageInputs, render_page
from wasi_export.report_page.curves import curves_chart
from wasi_export.report_page.inputs import Epoch, ModelFigures, Stage, figures_of
from wasi_export.report_page.latency import latency_chart
from wasi_export.report_page.layers import group_layers, layer_chart
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
    assert "bundle, int8 95.00 −1.00 0.40 p99 0.60 0.400 0.360–0.440" in page.text


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


def hostile_inputs() -> PageInputs:
    check = Check(name=HOSTILE, status="failed", value=1, threshold=0, unit=HOSTILE, detail=HOSTILE)
    host = make_report().host.model_copy(update={"machine": HOSTILE, "versions": {HOSTILE: HOSTILE}})
    names = ("baseline", "bundle", HOSTILE)
    report = make_report(
        *CHECKS, check, Check(name=f"accuracy of {HOSTILE}", status="info", value=0.5),
        latency=tuple(map(make_latency, names)), model=HOSTILE, bundle=HOSTILE, target=HOSTILE, host=host,
    )  # fmt: skip
    layers = (layer(f"{HOSTILE}.0"), layer(HOSTILE, rank=None).model_copy(update={"reason": HOSTILE}))
    stage = Stage(label=HOSTILE, series="own", epochs=(epoch(),))
    return inputs_of(
        report, make_board_report(), layers=layers, stages=(stage,), facts={HOSTILE: HOSTILE}, is_run=True
    )


def test_hostile_names_are_text():
    page = render_page(hostile_inputs())
    read = Page(page)
    assert "script" not in {tag for tag, _ in read.tags}
    assert not [attrs for _, attrs in read.tags if "onerror" in attrs or "src" in attrs]
    assert "<script>alert(1)</script>" in read.text
    assert b"\x1b" not in page
    assert "\u202e" not in page.decode()


@pytest.mark.parametrize("inputs", [hostile_inputs, lambda: inputs_of(full_report())])
def test_nothing_is_loaded_and_the_drawings_are_xml(inputs):
    page = render_page(inputs()).decode()
    assert {"href", "src", "srcset", "action", "data", "xlink:href"}.isdisjoint(
        name for _, attributes in Page(page.encode()).tags for name in attributes
    )
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
    markup = layer_chart("k", group_layers(layers)[0], layers)
    assert len(marks(markup, "rect", "ghost")) == 3
    first, second = (float(bar["height"]) for bar in marks(markup, "rect", "s-own"))
    assert first == pytest.approx(2 * second, abs=0.1)
    ghost = float(marks(markup, "rect", "ghost")[0]["height"])
    assert ghost == pytest.approx(2 * first, abs=0.1)  # 144 is the break-even rank
    low, high = (float(dot["cy"]) for dot in marks(markup, "circle", "s-own"))
    assert high < low


def test_the_time_of_layers_is_shown_where_it_was_measured():
    timed = [layer("a.0", factored_ms=0.1, dense_ms=0.2), layer("a.1")]
    markup = layer_chart("k", group_layers(timed)[0], timed)
    assert len(marks(markup, "circle", "s-dense")) == 1
    assert len(marks(markup, "circle", "s-own")) == 3
    assert not marks(layer_chart("k", group_layers(timed[1:])[0], timed[1:]), "circle", "s-dense")


@pytest.mark.parametrize(("value", "text"), [(0.0084, "+0.84"), (-0.01, "−1.00"), (-0.00001, "±0.00")])
def test_points_have_a_sign(value, text):
    assert points(value) == text
