"""`wasi-export adapt`: the board goes on learning, with onnxruntime and numpy alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wasi_export.cli._console import JsonFlag, exit_codes, print_json, print_table, track, working
from wasi_export.cli._options import given_options, require_option
from wasi_export.cli._target import TargetOption

if TYPE_CHECKING:
    from wasi_export.runtimes.adapt import AdaptProgress

SOURCES = ("data", "replay", "val")
"""The options that name images."""


@exit_codes
def adapt(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="Folder that `export --train-graph` wrote.")],
    data: Annotated[
        str,
        typer.Option(help="Images to learn: a folder of class folders, an .npz, or a named source."),
    ],
    state: Annotated[Path, typer.Option(help="Folder of what is learnt; resumes what is there.")],
    replay: Annotated[
        str | None, typer.Option(help="Images of what the model knows, so that it does not forget.")
    ] = None,
    replay_share: Annotated[
        float, typer.Option(min=0.0, max=0.95, help="Share of --replay in what is seen.")
    ] = 0.5,
    val: Annotated[
        str | None, typer.Option(help="Images to judge on. Default: a fifth of --data and of --replay.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Take so many images of --data, by seed.")] = None,
    replay_limit: Annotated[int | None, typer.Option(min=2, help="The same of --replay.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: as exported, see inspect.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images of a step.")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Images in memory at a time; needs adapt.accumulate at export.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    sched: Annotated[Literal["cosine", "constant"] | None, typer.Option(help="Schedule of the rate.")] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="End after so many epochs without a better accuracy.")
    ] = None,
    augment: Annotated[bool, typer.Option(help="Crop at random, and mirror where training did.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the order and the augmentation.")] = 0,
    commit_every: Annotated[int, typer.Option(min=1, help="Steps from one saved state to the next.")] = 25,
    threads: Annotated[int, typer.Option(min=1, help="Threads of onnxruntime.")] = 1,
    nice: Annotated[int, typer.Option(min=0, max=19, help="Lower the priority of the process.")] = 0,
    max_seconds: Annotated[float | None, typer.Option(help="Stop, saved, after so long.")] = None,
    max_rss_mb: Annotated[float | None, typer.Option(help="Stop, saved, above so many 10^6 bytes.")] = None,
    max_celsius: Annotated[float | None, typer.Option(help="Pause while the processor is hotter.")] = None,
    max_joules: Annotated[
        float | None, typer.Option(help="Stop, saved, after so much energy, where there is a meter (RAPL).")
    ] = None,
    target: TargetOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Train on this machine, or on another, from the state that is there to the best one on held-out images.

    The state is saved every few steps. Ctrl-C, SIGTERM, kill -9 and a power cut lose no saved step: the same
    command goes on from there, to the bit.
    """
    import os

    from wasi_export.datasets import load_labelled, load_new_images
    from wasi_export.errors import ConfigError
    from wasi_export.runtimes.adapt import AdaptImages, AdaptOptions, adapt_images
    from wasi_export.runtimes.adapt import adapt as train
    from wasi_export.runtimes.adapter import Adapter
    from wasi_export.runtimes.augment import HFLIP, SCALE
    from wasi_export.runtimes.budget import Budget

    if lr is not None and not 0 < lr < float("inf"):
        raise ConfigError(f"--lr must be above 0, got {lr:g}: leave it out for that of the export")
    require_option(context, "replay", ("replay_share", "replay_limit"))
    if target:
        here = ("context", "bundle", "target", "state", "as_json", *SOURCES)
        sources = {name: source for name, source in zip(SOURCES, (data, replay, val), strict=True) if source}
        progress = _learn_on(target, bundle, sources, given_options(context, here), state)
        _show(f"on {target}", progress, state, as_json=as_json)
        return
    os.nice(nice)
    adapter = Adapter.open(bundle, threads=threads)
    classes, known = adapter.bundle.manifest.classes, adapter.settings
    if known.loss != "cross_entropy":
        raise ConfigError(
            f"{bundle} was exported with adapt.loss = {known.loss!r}, whose targets are no labels: train it "
            "from Python (wasi_export.runtimes.Adapter), or export it again with cross_entropy"
        )
    new = load_new_images(data, classes, track=track).sample(limit, seed)
    old = load_new_images(replay, classes, track=track).sample(replay_limit, seed) if replay else None
    judged = load_labelled(val, classes, trained_on=adapter.bundle.trained_on, track=track) if val else None
    images: AdaptImages = adapt_images(new, old, judged)
    options = AdaptOptions(
        epochs=epochs or known.epochs,
        batch_size=batch_size or known.batch_size,
        lr=lr or known.lr,
        sched=sched or known.sched,
        warmup_steps=known.warmup_steps,
        seed=seed,
        augment=augment,
        scale=known.scale or SCALE,
        hflip=HFLIP if known.hflip is None else known.hflip,
        replay_share=replay_share,
        patience=patience,
        commit_every=commit_every,
        micro_batch=micro_batch,
    )
    budget = Budget(
        max_seconds=max_seconds, max_rss_mb=max_rss_mb, max_celsius=max_celsius, max_joules=max_joules
    )
    progress = train(adapter, images, options, state, budget=budget, track=track)
    title = f"{adapter.bundle.manifest.name}: {len(images.new)} new images"
    title += f", {len(images.replay)} to replay" if images.replay else ""
    _show(title, progress, state, as_json=as_json)


def _learn_on(
    name: str, bundle: Path, sources: Mapping[str, str], options: Sequence[str], state: Path
) -> "AdaptProgress":
    """Returns what was learnt on a target from sources of images by their options."""
    import tempfile

    from wasi_export.artifact import Bundle
    from wasi_export.datasets import load_labelled, load_new_images
    from wasi_export.runtimes.elsewhere.adapt import adapt_elsewhere
    from wasi_export.runtimes.elsewhere.data import data_on
    from wasi_export.runtimes.targets.address import open_target

    opened = Bundle.open(bundle)
    classes = opened.manifest.classes
    with working(f"on {name}"), tempfile.TemporaryDirectory() as folder, open_target(name) as target:
        sent = {}
        for option, source in sources.items():
            load = load_labelled if option == "val" else load_new_images
            sent[f"--{option}"] = data_on(target, source, classes, Path(folder), load=load)
        return adapt_elsewhere(target, opened, sent, options, state)


def _show(title: str, progress: "AdaptProgress", state: Path, *, as_json: bool) -> None:
    if as_json:
        print_json(progress)
        return
    print_table(
        title,
        ("epoch", "steps", "train loss", "accuracy", "learning rate", "seconds"),
        [
            (
                str(line.epoch) + (" (kept)" if line.epoch == progress.best_epoch else ""),
                str(line.steps),
                "" if line.train_loss is None else f"{line.train_loss:.4f}",
                "" if line.accuracy is None else f"{line.accuracy:.4f}",
                f"{line.lr:.2e}",
                f"{line.seconds:.1f}",
            )
            for line in progress.history
        ],
    )
    if progress.rollbacks:
        typer.echo(
            f"{progress.rollbacks} losses were not finite: the rate is {progress.rate:g} of what was asked"
        )
    ended = progress.ended or f"time or energy is spent at step {progress.step}: the same command goes on"
    typer.echo(f"ended: {ended}\nstate: {state}")
