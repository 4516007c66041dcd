"""How fast are models on another machine? An emulated one has no clock: its instructions are counted."""

from collections.abc import Sequence
from pathlib import Path

from wasi_export.errors import UsageError
from wasi_export.report import Benchmark, Host
from wasi_export.runtimes.instructions import count_instructions
from wasi_export.runtimes.targets.target import LocalTarget, Target, output_of

RUN_SECONDS = 3600.0


def bench_elsewhere(
    target: Target, models: Sequence[tuple[str, Path]], *, batch: int, threads: int, rounds: int, warmup: int
) -> Benchmark:
    """Returns latencies of a board; of an emulated one the instructions, since its clock means nothing.

    Raises:
        HostError: the target is lost.
        WasiExportError: what `bench` raises there.
    """
    if isinstance(target, LocalTarget) and target.evidence == "emulated":
        if threads != 1:
            raise UsageError(f"instructions are counted of one thread, got --threads {threads}: leave it out")
        counts = count_instructions(target, models, batch=batch, seconds=RUN_SECONDS)
        return Benchmark(instructions=counts, host=host_of(target))
    options = (f"--batch={batch}", f"--threads={threads}", f"--rounds={rounds}", f"--warmup={warmup}")
    paths = [target.send(path) for _, path in models]
    arguments = ("-m", "wasi_export", "bench", *paths, *options, "--json")
    ended = output_of(target, arguments, seconds=RUN_SECONDS)
    found = Benchmark.model_validate_json(ended.stdout)
    named = tuple(
        latency.model_copy(update={"model": name})
        for (name, _), latency in zip(models, found.latency, strict=True)
    )
    return found.model_copy(update={"latency": named, "board": ended.board})


def host_of(target: Target) -> Host:
    """Returns what machine a target is."""
    program = "from wasi_export.runtimes.host import describe_host; print(describe_host().model_dump_json())"
    ended = output_of(target, ("-c", program), seconds=RUN_SECONDS)
    return Host.model_validate_json(ended.stdout).model_copy(update={"evidence": target.evidence})
