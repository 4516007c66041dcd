"""What a page does not show because it was not measured, and which command would."""

from collections.abc import Iterator

from wasi_export.report_page.inputs import DENSE, PageInputs


def gaps_of(inputs: PageInputs) -> Iterator[tuple[str, str]]:
    """Yields what is missing, and the command."""
    first, models = inputs.reports[0], inputs.figures
    here = first.host.evidence == "device"
    names = {model.name for model in models}
    if not any(model.accuracy is not None for model in models):
        yield "accuracy", "wasi-export validate BUNDLE --data IMAGES"
    if here and not first.latency:
        yield "latency beside the dense model", "wasi-export validate BUNDLE --baseline DENSE_BUNDLE"
    elif first.latency and DENSE not in names:
        yield "the dense model", "wasi-export validate BUNDLE --baseline DENSE_BUNDLE"
    if any(model.accuracy is not None for model in models) and first.comparison is None:
        yield (
            "answers beside those of the dense model",
            "wasi-export validate BUNDLE --data IMAGES --baseline DENSE_BUNDLE",
        )
    if not any(report.instructions for report in inputs.reports):
        yield (
            "instructions on an emulated Raspberry Pi",
            "wasi-export validate BUNDLE --target arm64 --report REPORT/arm64",
        )
    if not any(report.host.evidence == "device" and report.target for report in inputs.reports):
        yield "a real board", "wasi-export validate BUNDLE --target ssh://BOARD --report REPORT/board"
    if not inputs.is_run:
        yield "layers, training curves and memory of training", "wasi-export run CONFIG"
        return
    if not first.layers:
        yield "time of each layer", "wasi-export run CONFIG --force"
    if not inputs.steps:
        yield "memory over a training step", "wasi-export run CONFIG --force"
    if not any(model.step_memory_mb is not None for model in models):
        yield "memory of a training step", "wasi-export run CONFIG, on Linux"
