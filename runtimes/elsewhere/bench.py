"""How fast are models on another machine? An emulated one has no clock: its instructions are counted."""

from collections.abc import Sequence
from pathlib import Path

from wasi_export.errors import UsageError
from wasi_export.report import Benchmark, Host
from wasi_export.runtimes.instructions import count_instructions
from wasi_export.runtimes.targets.target import RUN_SECONDS, Target, document_of


def bench_elsewhere(
    target: Target, models: Sequence[tuple[str, Path]], *, batch: int, threads: int, rounds: int, warmup: int
) -> Benchmark:
    """Returns latencies of a board; of an emulated one the instructions, since its clock means nothing.

    Raises:
        HostError: the target is lost.
        WasiExportError: what `bench` raises there.
    """
    if target.evidence == "emulated":
        if threads != 1:
            raise UsageError(f"instructions are counted of one thread, got --threads {threads}: leave it out")
        counts = count_instructions(target, models, batch=batch, seconds=RUN_SECONDS)
        return Benchmark(instructions=counts, host=host_of(target))
    options = (f"--batch={batch}", f"--threads={threads}", f"--rounds={rounds}", f"--warmup={warmup}")
    paths = [target.send(path) for _, path in models]
    arguments = ("-m", "wasi_export", "bench", *paths, *options, "--json")
    found, ended = document_of(target, Benchmark, arguments)
    named = tuple(
        latency.model_copy(update={"model": name})
        for (name, _), latency in zip(models, found.latency, strict=True)
    )
    return found.model_copy(update={"latency": named, "board": ended.board})


def host_of(target: Target) -> Host:
    """Returns what machine a target is."""
    program = "from wasi_export.runtimes.host import describe_host; print(describe_host().model_dump_json())"
    host, _ = document_of(target, Host, ("-c", program))
    return host.model_copy(update={"evidence": target.evidence})
