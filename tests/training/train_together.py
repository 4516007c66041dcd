"""What each process of test_processes.py runs: trainings of the tiny model, and what came out of them.

    python train_together.py CONFIG FOLDER

writes FOLDER/<case>-<process>.safetensors with the parameters and FOLDER/<case>-<process>.jsonl with the
metrics of every epoch, and FOLDER/error-<process>.txt with an error that only the main process meets.
"""

import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from wasi_export.config import Config
from wasi_export.datasets import load_data
from wasi_export.errors import DataError
from wasi_export.subspace.inject import install_layers, subspace_layers
from wasi_export.subspace.lora import add_lora
from wasi_export.training.data import make_loader, random_numbers
from wasi_export.training.loop import fit
from wasi_export.training.models import create_model, input_spec
from wasi_export.training.planning import factorize
from wasi_export.training.processes import leave_processes, make_accelerator, on_main


def start(config: Config, case: str) -> nn.Module:
    """Returns a model; each process makes another, so that they are equal only once synchronised."""
    accelerator = make_accelerator()
    with random_numbers(accelerator.process_index):
        model = create_model(config.model, 10)
    if case in {"factored", "right", "compressed", "wsi"}:
        plan = on_main(accelerator, lambda: factorize(config, model, load_data(config.data)[0]))
        if not accelerator.is_main_process:
            install_layers(model, plan)
    if case == "right":
        for _, layer in subspace_layers(model):
            layer.left.requires_grad_(False)
    if case == "lora":
        with random_numbers(accelerator.process_index):
            add_lora(model, ["blocks.0.attn.qkv", "blocks.0.mlp.fc1"], 4, trained=[model.head])
    return model


def train(config: Config, case: str, folder: Path) -> None:
    """Trains one case and writes what came out."""
    model, process = start(config, case), make_accelerator().process_index
    spec = input_spec(model, config)
    train_images, val_images = load_data(config.data)
    history = fit(
        model,
        make_loader(train_images, spec, config.data, training=True),
        make_loader(val_images, spec, config.data, training=False),
        config.train.subspace,
        None,
        seed=0,
    )
    state = {name: value.detach().contiguous() for name, value in model.named_parameters()}
    save_file(state, folder / f"{case}-{process}.safetensors")
    lines = "".join(f"{metrics.model_dump_json()}\n" for metrics in history)
    (folder / f"{case}-{process}.jsonl").write_text(lines)


def fail_on_main(folder: Path) -> None:
    """Lets the main process fail, and writes the error that this one gets."""

    def fail() -> None:
        raise DataError("seen by the main process")

    accelerator = make_accelerator()
    try:
        on_main(accelerator, fail)
    except DataError as error:
        (folder / f"error-{accelerator.process_index}.txt").write_text(str(error))


def main() -> None:
    config, folder = Config.from_toml(Path(sys.argv[1])), Path(sys.argv[2])
    values = config.model_dump(exclude_none=True)
    whole = Config.from_mapping(values, ['subspace.activation="none"'])
    for case in ("dense", "factored", "right", "lora"):
        train(whole, case, folder)
    compressed = ["subspace.activation=feature+token", "train.subspace.epochs=3"]
    train(Config.from_mapping(values, compressed), "compressed", folder)
    wsi = [*compressed, "train.subspace.update=wsi", "train.subspace.factor_lr=0.03"]
    train(Config.from_mapping(values, wsi), "wsi", folder)
    train(Config.from_mapping(values, ["train.subspace.memory.micro_batch=4"]), "micro", folder)
    train(Config.from_mapping(values, ["data.batch_size=8"]), "half", folder)
    fail_on_main(folder)
    leave_processes()


if __name__ == "__main__":
    main()
