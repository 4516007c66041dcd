"""How often the gate of `validate` decides, and how often rightly, on this machine as it is.

    python benchmarks/gates.py accuracy    # a minute
    python benchmarks/gates.py latency     # twenty minutes on a core that does nothing else
    python benchmarks/gates.py --docs      # the tables of what was run into docs/gates.md, no run
    python benchmarks/gates.py --json      # prints the result

Latency: ViT-Tiny/16 with random weights, dense and at f = 0.4, in a fresh process each time. The ratio is
taken to be the median of the ratios of `REPEATS` runs; thresholds are that times 1 plus a margin. `one_run`
is the ratio of the first rounds alone. Accuracy: simulated bundles of which the drop is known, 6 % of whose
images change sides; a gate of 2 % without `accuracy_confidence` and with it.

The result is written at the end.
"""

import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from inference import OPSET, SPEC, make_model, plan_of, save
from kept import new_parser, read_result, to_json, write_result
from pages import fill

from wasi_export.config import Thresholds
from wasi_export.converters.inference import export_inference
from wasi_export.runtimes.accuracy import Pairs
from wasi_export.runtimes.bench import measure_latency
from wasi_export.runtimes.checks import drop_check, latency_check
from wasi_export.runtimes.host import describe_host
from wasi_export.views import markdown_table

RESULT, PAGE = Path("benchmarks/results/gates.json"), Path("docs/gates.md")
MARK, END = "<!-- benchmarks/gates.py: {} -->\n", "<!-- end of {} -->"
MODEL, FRACTION, ROUNDS = "vit_tiny_patch16_224", 0.4, 30
REPEATS, DECISIONS = 12, 8
MARGINS = (0.1, 0.05, 0.02, 0.0, -0.02, -0.05, -0.1)
DRAWS, GATE, CHANGES = 20_000, 0.02, 0.06
STATUSES = ("passed", "undecided", "failed")
Graphs = list[tuple[str, Path]]


def main() -> None:
    """Measures, simulates, and writes tables."""
    parser = new_parser(__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS, help="what to run")
    parser.add_argument("--docs", action="store_true", help="the tables into the page, no run")
    options = parser.parse_args()
    result = read_result(RESULT, {"protocol": __doc__})
    if options.part:
        measure, _ = PARTS[options.part]
        result[options.part] = {"host": describe_host().model_dump(mode="json"), "found": measure()}
        write_result(RESULT, result)
    if options.docs:
        for name, (_, table) in PARTS.items():
            if name in result:
                fill(PAGE, MARK.format(name), END.format(name), table(result[name]["found"]))
    if options.json:
        print(to_json(result))


def latency() -> dict[str, Any]:
    """Returns runs without a threshold, and what was decided with thresholds around their ratio."""
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as fresh,
    ):
        graphs = []
        for row, plan in (("dense", None), ("low-rank", plan_of(MODEL, FRACTION, aligned=False))):
            graph = export_inference(make_model(MODEL, plan), SPEC, opset=OPSET)
            graphs.append((row, save(graph, Path(folder), row)))
        runs = [fresh.submit(one_run, graphs, None).result() for _ in range(REPEATS)]
        ratio = median(run["ratio_to_first"] for run in runs)
        decisions = {
            margin: [fresh.submit(one_run, graphs, ratio * (1 + margin)).result() for _ in range(DECISIONS)]
            for margin in MARGINS
        }
    return {
        "ratio": ratio,
        "runs": runs,
        "decisions": [{"margin": margin, "runs": found} for margin, found in decisions.items()],
    }


def one_run(graphs: Graphs, threshold: float | None) -> dict[str, Any]:
    """Returns the figures of the second graph, and what the gate makes of them."""

    def status_of(found: Any) -> str:
        check = latency_check(found, threshold)
        assert check is not None
        return check.status

    decided = None if threshold is None else lambda found: status_of(found) != "undecided"
    found = measure_latency(graphs, rounds=ROUNDS, decided=decided)
    first, own = found
    early = median(np.array(own.samples_ms[:ROUNDS]) / np.array(first.samples_ms[:ROUNDS]))
    return own.model_dump(exclude={"samples_ms"}) | {
        "threshold": threshold,
        "status": status_of(found),
        "rounds": len(own.samples_ms),
        "one_run": early,
    }


def accuracy() -> list[dict[str, Any]]:
    """Returns how often a gate passes bundles that lose more than it allows, and ones that do not."""
    rng, rows = np.random.default_rng(0), []
    for images in (200, 1000, 5000, 20_000):
        for drop in (0.0, 0.01, 0.02, 0.03, 0.04):
            lost, won = (CHANGES + drop) / 2, (CHANGES - drop) / 2
            tables = rng.multinomial(images, (0.9 - lost, lost, won, 0.1 - won), DRAWS)
            kinds, counts = np.unique(tables[:, 1:3], axis=0, return_counts=True)
            row: dict[str, Any] = {"images": images, "drop": drop}
            for name, confidence in (("as measured", None), ("0.95", 0.95)):
                limits = Thresholds(max_accuracy_drop=GATE, accuracy_confidence=confidence)
                seen: Counter[str] = Counter()
                for (first, second), count in zip(kinds.tolist(), counts.tolist(), strict=True):
                    pairs = Pairs(images - first - second, first, second, 0)
                    seen[drop_check("drop", pairs, GATE, limits, "").status] += count
                row[name] = {status: seen[status] / DRAWS for status in STATUSES}
            rows.append(row)
    return rows


def latency_table(found: dict[str, Any]) -> str:
    """Returns a row for each threshold, and what the rows are of."""
    rows = []
    for decision in found["decisions"]:
        runs = decision["runs"]
        seen = Counter(run["status"] for run in runs)
        point = Counter("passed" if run["one_run"] <= run["threshold"] else "failed" for run in runs)
        rounds = sum(run["rounds"] for run in runs) / len(runs)
        rows.append(
            (
                f"{decision['margin']:+.0%}",
                *(str(seen[status]) for status in STATUSES),
                f"{rounds:.0f}",
                f"{point['passed']} : {point['failed']}",
            )
        )
    columns = ("threshold over the ratio", *STATUSES, "rounds", "by one ratio, passed : failed")
    noise = [run["noise_floor"] for run in found["runs"]]
    return (
        f"ViT-Tiny/16 at f = {FRACTION:g} takes {found['ratio']:.3f} of the time of dense; noise floor "
        f"{min(noise):.1%} to {max(noise):.1%} in {len(noise)} runs of {ROUNDS} rounds. With thresholds near "
        f"that, each run a process of its own:\n\n{markdown_table(columns, 'rrrrrr', rows)}\n\n"
        f"The last column is what the median of the first {ROUNDS} rounds alone would have said."
    )


def accuracy_table(found: list[dict[str, Any]]) -> str:
    """Returns a row for each number of images and true drop."""
    rows = (
        (
            f"{row['images']:,}",
            f"{row['drop']:.0%}",
            f"{row['as measured']['passed']:.1%}",
            *(f"{row['0.95'][status]:.1%}" for status in STATUSES),
        )
        for row in found
    )
    columns = ("images", "true drop", "passed as measured", *(f"{s}, 0.95" for s in STATUSES))
    return markdown_table(columns, "rrrrrr", rows)


PARTS: Mapping[str, tuple[Callable[[], Any], Callable[[Any], str]]] = {
    "accuracy": (accuracy, accuracy_table),
    "latency": (latency, latency_table),
}
"""What measures a part, and what makes a table of it."""

if __name__ == "__main__":
    main()
