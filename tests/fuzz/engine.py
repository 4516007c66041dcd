"""Gives a reader the inputs that libFuzzer makes of valid ones, by the code that they reach.

    python tests/fuzz/engine.py READER FINDINGS [libFuzzer's options]
    python tests/fuzz/engine.py --names

FINDINGS gets a line of JSON for every kind of finding; its folder should be in memory. An input that takes
more than five seconds, or 1 GB of memory beside torch, ends the process; libFuzzer leaves it beside FINDINGS.

Source: https://github.com/google/atheris
"""

import base64
import json
import sys
import warnings
from pathlib import Path
from random import Random

import atheris

sys.path[:0] = [str(Path(__file__).parents[1])]
sys.dont_write_bytecode = True
with atheris.instrument_imports(include=["wasi_export"]):
    from fuzz.forms import mutate
    from fuzz.planted import CARELESS
    from fuzz.readers import READERS
    from fuzz.trial import try_input

MAX_BYTES, MAX_SECONDS, MAX_MEMORY_MB, TORCH_MB = 1 << 14, 5, 1024, 1024


def main() -> None:
    """Runs until libFuzzer ends the process."""
    if sys.argv[1:] == ["--names"]:
        sys.stdout.write("\n".join(READERS))
        return
    reader, findings = (READERS | {CARELESS.name: CARELESS})[sys.argv[1]], Path(sys.argv[2])
    scratch = findings.resolve().parent
    folder, corpus = scratch / "folder", scratch / "corpus"
    folder.mkdir()
    corpus.mkdir()
    with atheris.instrument_imports(include=["wasi_export"]):
        seeds = reader.prepare(folder)
        for seed in seeds:  # and all that they import is there
            reader.read(seed, folder)
    for index, seed in enumerate(seeds):
        (corpus / str(index)).write_bytes(seed)
    seen: set[str] = set()
    warnings.simplefilter("ignore")

    def one_input(data: bytes) -> None:
        found = try_input(reader, data, folder)
        if found is not None and found.error not in seen:
            seen.add(found.error)
            line = {"error": found.error, "message": found.message, "input": base64.b64encode(data).decode()}
            with findings.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        def change_bytes(old: bytes) -> bytes:
            return bytes(atheris.Mutate(old, max_size))

        random = Random(seed)
        start = random.choice(seeds) if random.random() < 0.2 else data
        return mutate(start, reader.form, random, change_bytes)[:max_size]

    memory = MAX_MEMORY_MB + (TORCH_MB if reader.needs_torch else 0)
    limits = (f"-max_len={MAX_BYTES}", f"-timeout={MAX_SECONDS}", f"-rss_limit_mb={memory}")
    options = (
        *limits,
        f"-artifact_prefix={findings}.",
        "-mutate_depth=2",
        "-close_fd_mask=2",
        "-print_final_stats=1",
        *sys.argv[3:],
    )
    atheris.Setup([sys.argv[0], *options, str(corpus)], one_input, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
