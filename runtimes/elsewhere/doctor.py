"""The examination of another machine, which it makes itself."""

from pathlib import Path

from wasi_export.artifact import Bundle
from wasi_export.runtimes.doctor import Examination
from wasi_export.runtimes.targets.target import Target, document_of

SECONDS = 600.0


def examine_elsewhere(target: Target, bundle: Path | None) -> Examination:
    """Returns what is good and what is not on a target, and whether a bundle runs there.

    Raises:
        HostError: the target is lost.
        IntegrityError: it is no bundle, or a file of it is not what its manifest says.
    """
    sent = [target.send(Bundle.open(bundle).path)] if bundle else []
    arguments = ("-m", "wasi_export", "doctor", *sent, "--json")
    return document_of(target, Examination, arguments, seconds=SECONDS)[0]
