"""What the machine does to a command: it ends it, or has no memory or no disk left; no bug, and one line."""

import contextlib
import errno
import re
from collections.abc import Iterator

from wasi_export.durable import REMEDIES
from wasi_export.errors import HostError, UsageError, first_line
from wasi_export.interrupt import sigterm_interrupts

_NO_MEMORY = re.compile(
    r"can't allocate memory"  # torch, on the processor
    r"|out of memory"  # torch, on a GPU
    r"|bad_alloc|bad allocation|Failed to allocate memory"  # onnxruntime
    r"|Unable to allocate|Cannot allocate memory"  # numpy, the system
)


@contextlib.contextmanager
def machine_faults() -> Iterator[None]:
    """Turns SIGTERM into Ctrl-C, and what memory and disk refuse into errors of ours.

    Raises:
        HostError: memory is used up.
        UsageError: a disk is full, broken or not to be written, or something may not be opened.
    """
    try:
        with sigterm_interrupts():
            yield
    except Exception as error:
        if is_out_of_memory(error):
            raise HostError(
                f"memory is used up ({first_line(error)}): take smaller batches (data.batch_size, "
                "--batch-size, --micro-batch) or keep less (train.*.memory, adapt.recompute); what was saved "
                "is still there"
            ) from error
        if isinstance(error, OSError) and (error.errno in REMEDIES or isinstance(error, PermissionError)):
            remedy = REMEDIES.get(error.errno or 0, "allow it, or choose another place")
            raise UsageError(f"{error.strerror}: {error.filename or 'no file is named'}: {remedy}") from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error, or one that it comes from, says that there is no memory."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if _NO_MEMORY.search(str(error)):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)
