"""`adapt` on another machine: the state stays there, and comes here whenever a run there has ended.

The state on the target goes by the bundle and by the folder here that it is for, so that the same command
goes on from it, also after a lost connection. Where the target has none, the one from here is taken.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from wasi_export.artifact import Bundle
from wasi_export.durable import fingerprint, require_replaceable, staged_folder
from wasi_export.errors import HostError, UsageError
from wasi_export.runtimes.adapt import AdaptProgress
from wasi_export.runtimes.targets.target import Target, document_of, output_of

SECONDS, ASK_SECONDS = 7 * 24 * 3600.0, 600.0
_LIST = "import os, sys; print(*os.listdir(sys.argv[1]))"
_COPY = "import shutil, sys; shutil.copytree(*sys.argv[1:], dirs_exist_ok=True)"


def adapt_elsewhere(
    target: Target, bundle: Bundle, sources: Mapping[str, str], options: Sequence[str], state: Path
) -> AdaptProgress:
    """Returns what was learnt on a target, its state in a folder here.

    Args:
        target: that learns.
        bundle: with a training step.
        sources: path on the target of each option that names images.
        options: the others of the command, as they were given.
        state: folder of this machine.

    Raises:
        HostError: the target is lost; what was saved there is still there.
        WasiExportError: what `adapt` raises there.
    """
    require_replaceable(state)
    there = target.folder(f"state-{fingerprint(bundle.training_identity, state.resolve())}")
    if state.exists() and not state.is_dir():
        raise UsageError(f"{state} is no folder: name another for the state")
    is_here = state.is_dir() and any(state.iterdir())
    if is_here and not output_of(target, ("-c", _LIST, there), seconds=ASK_SECONDS).stdout.strip():
        output_of(target, ("-c", _COPY, target.send(state), there), seconds=ASK_SECONDS)
    named = [word for name, path in sources.items() for word in (name, path)]
    arguments = ("-m", "wasi_export", "adapt", target.send(bundle.path), *named, "--state", there, *options)
    try:
        progress, _ = document_of(target, AdaptProgress, (*arguments, "--json"), seconds=SECONDS)
    except HostError as error:
        raise HostError(f"{error}; what was saved is still there: the same command goes on") from error
    with staged_folder(state, force=True) as folder:
        target.fetch(there, folder)
    return progress
