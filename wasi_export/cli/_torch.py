"""What a command does before it imports torch."""

import os


def prepare_torch() -> None:
    """Checks that the training extra is installed, and keeps torch's idle threads from spinning.

    Call it before torch is imported. On two busy cores, OpenMP threads that spin while they wait for one
    another made a small model ten times slower; sleeping threads cost little on idle cores.

    Raises:
        MissingExtraError: the training extra is not installed.
    """
    from wasi_export._extras import require

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    require("timm", extra="train")
