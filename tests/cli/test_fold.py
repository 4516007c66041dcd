"""Which layers are folded, by times measured here: of forms that differ several times in their work."""

from pathlib import Path

import pytest

from wasi_export.cli._fold import choose_folds
from wasi_export.ranks import LayerPlan, Plan


def layer(name: str, size: int, rank: int | None, tokens: int | None = 64) -> LayerPlan:
    return LayerPlan(
        name=name,
        in_features=size,
        out_features=size,
        rank=rank,
        method=None if rank is None else "plain",
        energy=None,
        tokens=tokens,
        reason="for the test",
    )


SMALL, FULL = layer("small", 512, 32), layer("full", 512, 480)
UNTIMED, DENSE = layer("untimed", 512, 480, tokens=None), layer("dense", 512, None)
PLAN = Plan(activation_mode="none", layers=(SMALL, FULL, UNTIMED, DENSE))


def test_never_leaves_the_plan_as_it_is() -> None:
    assert choose_folds(PLAN, "never") == PLAN


def test_always_makes_every_layer_dense() -> None:
    folded = choose_folds(PLAN, "always")
    assert not folded.factored
    assert [layer.reason for layer in folded.layers] == ["folded, as asked for"] * 3 + ["for the test"]


def test_the_faster_form_wins_and_both_times_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small, full, untimed, dense = choose_folds(PLAN, "auto").layers
    assert (small.rank, full.rank) == (32, None)
    assert small.factored_ms is not None
    assert small.dense_ms == full.dense_ms
    assert full.reason == f"folded: {full.dense_ms:.3f} ms dense, {full.factored_ms:.3f} as a pair"
    assert (untimed, dense) == (UNTIMED, DENSE)
    assert choose_folds(PLAN, "auto").layers == (small, full, untimed, dense)  # from the cache
