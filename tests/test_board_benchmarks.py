"""The benchmarks of the board: the page shows the committed results, and these show what is said of them."""

import json
from pathlib import Path

import adapt_process
import board_story
import pytest
import step_graph

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adapt.md").read_text(encoding="utf-8")


def result_of(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", [adapt_process, board_story, step_graph], ids=lambda one: one.__name__)
def test_the_page_shows_the_table_of_the_committed_result(module) -> None:
    shown = PAGE[PAGE.index(module.MARK) + len(module.MARK) : PAGE.index(module.END)]
    assert shown == module.to_markdown(result_of(module.RESULT.stem)) + "\n"


def test_training_on_the_board_takes_no_more_memory_as_it_goes_on() -> None:
    resident = result_of("adapt_process")["memory"]["rss_mb"]
    assert max(resident) < 1.01 * min(resident)


def test_computing_blocks_again_takes_under_half_of_the_memory_of_torch() -> None:
    rows = {(row["case"], row["batch"]): row["ways"] for row in result_of("step_graph")["rows"]}
    for case, limit in (("dense", 0.45), ("factors", 0.33)):
        ways = {way: step_graph.summary(runs) for way, runs in rows[case, 8].items()}
        ours, torchs = ways["onnxruntime, recompute"], ways["torch eager"]
        assert ours["less_import_mib"] <= limit * torchs["less_import_mib"]
        assert ours["peak_mib"] <= 0.3 * torchs["peak_mib"]


def test_the_page_on_targets_has_the_instructions_that_were_counted():
    import instructions

    result = json.loads((ROOT / instructions.RESULT).read_text(encoding="utf-8"))
    page = (ROOT / instructions.PAGE).read_text(encoding="utf-8")
    assert f"{instructions.MARK}{instructions.to_markdown(result)}\n{instructions.END}" in page
    for measured in result["models"].values():
        for row in measured:
            counted, timed = row["pi5"]["ratio_to_first"], row["time"]["ratio_to_first"]
            low, high = (1.05, 1.17) if row["pi5"]["model"].endswith("int8") else (0.95, 1.05)
            assert low <= counted / timed <= high
            assert row["again"] < 0.002
    small = {row["pi4"]["model"]: row["pi4"]["total"] for row in result["models"]["vit_small_patch16_224"]}
    assert small["f = 0.2"] < small["f = 0.2, int8"]


def test_thousands_of_kills_lost_nothing_and_the_page_on_faults_says_so() -> None:
    import faults

    result = result_of("faults")
    page = (ROOT / faults.PAGE).read_text(encoding="utf-8")
    assert f"{faults.MARK}{faults.to_markdown(result)}\n{faults.END}" in page
    found = [result[command] for command in ("train", "export", "adapt")]
    assert sum(one["kills"] for one in found) >= 2000
    assert all(one["unreadable"] == one["lost"] == one["left_over"] == 0 for one in found)
    assert all(one["equal"] == one["ended"] > 0 for one in found)


def test_the_page_on_adapt_tells_its_kills_as_they_were_counted() -> None:
    adapt, page = result_of("faults")["adapt"], " ".join(PAGE.split())
    assert f"{adapt['kills']:,} times at random moments, {adapt['in_a_write']} of them while" in page
    assert f"all {adapt['equal']} trainings ended with the bits of one" in page
