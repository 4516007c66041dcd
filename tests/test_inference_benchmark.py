"""The inference benchmarks: graphs are what the rows say, and the pages show the committed results."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from inference import BRIEF_END, BRIEF_MARK, END, MARK, count_macs, make_model, plan_of
from inference_tables import to_brief_markdown, to_markdown
from timm_models import MARK as MODELS_MARK
from timm_models import passes
from timm_models import to_markdown as models_to_markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RESULT = json.loads((RESULTS / "inference.json").read_text(encoding="utf-8"))
MODELS = json.loads((RESULTS / "timm_models.json").read_text(encoding="utf-8"))
BRIEF = json.loads((RESULTS / "inference_brief.json").read_text(encoding="utf-8"))
ROWS = [
    pytest.param(row, id=f"{measured['model']}, {row['row']}, {result['host']['processor']}")
    for result in (RESULT, BRIEF)
    for measured in result["models"]
    for row in measured["rows"]
]


def test_the_page_shows_the_tables_of_the_committed_result() -> None:
    page = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8")
    assert page[page.index(MARK) + len(MARK) : page.index(END)] == to_markdown(RESULT) + "\n"
    assert f"{BRIEF_MARK}{to_brief_markdown([RESULT, BRIEF])}\n{BRIEF_END}" in page


def test_the_page_shows_what_masks_cost_and_the_graphs_are_those_two() -> None:
    import masks

    page = (ROOT / masks.PAGE).read_text(encoding="utf-8")
    result = json.loads((ROOT / masks.RESULT).read_text(encoding="utf-8"))
    assert f"{masks.MARK}{masks.to_markdown(result)}\n{masks.END}" in page
    graph, _ = masks.training_step()
    assert graph != (given := masks.with_given_masks(graph))
    assert graph.ByteSize() == given.ByteSize()


@pytest.mark.parametrize("row", ROWS)
def test_every_graph_was_right(row: dict[str, Any]) -> None:
    assert row["error"] < (0.1 if row["row"].endswith("int8") else 1e-5)


def test_the_page_of_models_shows_the_committed_result() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert page.endswith(MODELS_MARK + models_to_markdown(MODELS) + "\n")


@pytest.mark.skipif(timm.__version__ != MODELS["timm"], reason="another timm has other models")
def test_every_vision_transformer_of_timm_is_written_directly_and_right() -> None:
    direct = {row["model"] for row in MODELS["models"] if row.get("path") == "direct" and passes(row)}
    sources = {f"timm.models.{name}" for name in ("vision_transformer", "deit", "vision_transformer_hybrid")}
    assert direct == {
        name for name in timm.list_models() if timm.model_entrypoint(name).__module__ in sources
    }


def test_ranks_in_sixteens_are_at_most_those_asked_for_and_are_counted() -> None:
    plain, aligned = (plan_of("vit_tiny_patch16_224", 0.4, aligned=aligned) for aligned in (False, True))
    for one, other in zip(plain.layers, aligned.layers, strict=True):
        assert other.rank % 16 == 0
        assert 32 <= other.rank <= one.rank
    dense = count_macs(make_model("vit_tiny_patch16_224", None))
    factored = count_macs(make_model("vit_tiny_patch16_224", aligned))
    saved = sum(layer.tokens * (layer.dense_parameters - layer.parameters) for layer in aligned.layers)
    assert dense[0] - factored[0] == dense[1] - factored[1] == saved
    width, tokens, blocks = 192, 197, 12
    assert dense[1] - dense[0] == 2 * blocks * tokens**2 * width


def test_the_page_has_accuracy_over_latency_and_int8_costs_little() -> None:
    import real_inference

    result = json.loads((ROOT / real_inference.RESULT).read_text(encoding="utf-8"))
    page = (ROOT / real_inference.PAGE).read_text(encoding="utf-8")
    assert f"{real_inference.MARK}{real_inference.to_markdown(result)}\n{real_inference.END}" in page
    rows = {(row["f"], row["form"]): row for row in result["rows"]}
    assert {f for f, _ in rows} == {1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7}
    for f, form in rows:
        assert form == "fp32" or rows[f, "fp32"]["accuracy"] - rows[f, "int8"]["accuracy"] <= 0.0025
    dense, small = rows[1, "fp32"], rows[0.2, "fp32"]
    assert abs(dense["accuracy"] - small["accuracy"]) < 0.001
    assert 1 / small["ratio_to_first"] > 3.5
    assert 1 / rows[0.2, "int8"]["ratio_to_first"] > 5.3
