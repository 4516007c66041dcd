"""Three boards learn together and share no image: Flower's federated averaging over `Adapter`.

    wasi-export run                                             # makes runs/digits/bundle, three minutes
    python -m venv federated
    federated/bin/pip install . 'flwr[simulation]' scikit-learn  # in the folder of this repository; no torch
    federated/bin/python benchmarks/federated.py                # five minutes on two cores
    federated/bin/python benchmarks/federated.py --json         # the result that is there

The model of the built-in demo knows handwritten digits. Here it meets them lying on their side: every image
is turned by 90 degrees. A board has images of its own digits alone, 0 to 3, 4 to 6, or 7 to 9, of the
training images of scikit-learn's digits; the 359 held-out ones of all ten digits judge. In each of ten rounds
a board takes the server's weights, trains one epoch in batches of 16 (the exported optimiser, from its start,
at the exported rate) and sends its weights, numpy arrays by name, with the number of its images.

Two ways: *factors*, Flower's FedAvg as it is, which averages `left` and `right` each for itself; *products*,
the same with `average_weights` of this project, whose mean of a pair is the best pair of the mean product.
Beside them *alone*, ten epochs on each board and nothing sent, and the mean of those three, once, in both
ways. Accuracy is right answers among held-out images, of a board's own digits and of all; of the ten rounds
it goes up and down, so the mean of the last five is given too. The error of a mean is the norm of its
distance to the true mean product over that of the mean product's change, averaged over the pairs.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # or ray warns of what it will do one day

import flwr
import numpy as np
import ray
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import Array
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from kept import new_parser, new_result, read_result, to_json, write_result
from numpy.typing import NDArray
from PIL import Image

from wasi_export.datasets import load_splits
from wasi_export.image_set import ImageSet
from wasi_export.runtimes.adapter import Adapter
from wasi_export.runtimes.averaging import average_weights
from wasi_export.views import markdown_table

RESULT = Path("benchmarks/results/federated.json")
DIGITS = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))
ROUNDS, LAST, BATCH = 10, 5, 16
Weights = Mapping[str, NDArray[np.float32]]


class ProductAveraging(FedAvg):
    """FedAvg, with the mean that is right for factors."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the mean of the weights that came, by number of images, and Flower's mean of the rest."""
        replies = list(replies)
        metrics = super().aggregate_train(server_round, replies)[1]
        came = [reply.content for reply in replies if reply.has_content()]
        shares = [record["metrics"]["num-examples"] for record in came]
        return to_arrays(average_weights([to_weights(record["arrays"]) for record in came], shares)), metrics


WAYS = {"factors": FedAvg, "products": ProductAveraging}
client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """A board: takes the weights, trains an epoch on its digits, sends its weights."""
    adapter, config = opened(message), message.content["config"]
    images = of_digits(turned(0), DIGITS[int(context.node_config["partition-id"])])
    loss = train_epoch(adapter, images, int(config["server-round"]))
    metrics = MetricRecord({"loss": loss, "num-examples": len(images)})
    content = RecordDict({"arrays": to_arrays(adapter.weights()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """A board: judges the weights on held-out images of its digits."""
    images = of_digits(turned(1), DIGITS[int(context.node_config["partition-id"])])
    metrics = MetricRecord({"own digits": accuracy(opened(message), images), "num-examples": len(images)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


def opened(message: Message) -> Adapter:
    """Returns the model with the weights that came."""
    adapter = Adapter.open(str(message.content["config"]["bundle"]))
    adapter.set_weights(to_weights(message.content["arrays"]))
    return adapter


def train_epoch(adapter: Adapter, images: ImageSet, seed: int) -> float:
    """Takes an epoch of steps; returns the mean of their losses."""
    order = np.random.default_rng(seed).permutation(len(images))
    losses = []
    for start in range(0, len(order), BATCH):
        batch = [images[int(i)] for i in order[start : start + BATCH]]
        losses.append(adapter.step([image for image, _ in batch], [label for _, label in batch]))
    return float(np.mean(losses))


def accuracy(adapter: Adapter, images: ImageSet) -> float:
    """Returns the share of right answers."""
    found = adapter.predict([images[i][0] for i in range(len(images))])
    return float((found == images.labels).mean())


def turned(split: int) -> ImageSet:
    """Returns the training (0) or the held-out (1) images, on their side."""
    images = load_splits("digits")[split]
    turn = Image.Transpose.ROTATE_90
    return ImageSet(
        images.classes, images.labels, lambda i: images.read(i).transpose(turn), images.fingerprint
    )


def of_digits(images: ImageSet, digits: tuple[int, ...]) -> ImageSet:
    """Returns the images of some digits."""
    return images.take(np.flatnonzero(np.isin(images.labels, digits)))


def to_arrays(weights: Weights) -> ArrayRecord:
    """Returns weights as Flower sends them."""
    return ArrayRecord({name: Array(array) for name, array in weights.items()})


def to_weights(arrays: ArrayRecord) -> dict[str, NDArray[np.float32]]:
    """Returns weights as an adapter takes them."""
    return {name: array.numpy() for name, array in arrays.items()}


def together(bundle: Path, way: str, rounds: int) -> dict[str, Any]:
    """Returns the accuracies of the server's weights, before and after each round."""
    server, found = ServerApp(), {}

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        adapter = Adapter.open(bundle)
        config = {"bundle": str(bundle.resolve())}

        def judge(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            adapter.set_weights(to_weights(arrays))
            found[server_round] = accuracies(adapter)
            return MetricRecord({"all": found[server_round]["all"]})

        WAYS[way](
            min_train_nodes=len(DIGITS), min_evaluate_nodes=len(DIGITS), min_available_nodes=len(DIGITS)
        ).start(
            grid=grid, initial_arrays=to_arrays(adapter.weights()), num_rounds=rounds, evaluate_fn=judge,
            train_config=ConfigRecord(config), evaluate_config=ConfigRecord(config),
        )  # fmt: skip

    run_simulation(
        server, client, num_supernodes=len(DIGITS),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 2, "include_dashboard": False},
        },
    )  # fmt: skip
    assert len(found) == rounds + 1, f"{way}: {len(found) - 1} of {rounds} rounds"
    return {"rounds": [found[index] for index in sorted(found)]}


def alone(bundle: Path, rounds: int) -> dict[str, Any]:
    """Returns the accuracies of each board that learns for itself, and of their mean, after all epochs."""
    adapter, boards, states, shares = Adapter.open(bundle), [], [], []
    first = adapter.weights()
    for digits in DIGITS:
        board, images = Adapter.open(bundle), of_digits(turned(0), digits)
        for epoch in range(rounds):
            train_epoch(board, images, epoch + 1)
        boards.append(accuracies(board))
        states.append(board.weights())
        shares.append(len(images))
    means = {"factors": average_entries(states, shares), "products": average_weights(states, shares)}
    once = {}
    for way, mean in means.items():
        adapter.set_weights(mean)
        once[way] = {**accuracies(adapter), "error": mean_error(mean, states, shares, first)}
    return {"boards": boards, "once": once}


def average_entries(states: Sequence[Weights], shares: Sequence[int]) -> dict[str, NDArray[np.float32]]:
    """Returns the mean of each number, as FedAvg takes it."""
    return {name: np.average([s[name] for s in states], axis=0, weights=shares) for name in states[0]}


def mean_error(mean: Weights, states: Sequence[Weights], shares: Sequence[int], first: Weights) -> float:
    """Returns how far the pairs of a mean are from the mean of the products, over how far that one went."""
    errors = []
    for name in (name.removesuffix(".left") for name in mean if name.endswith(".left")):
        product, start = (w[f"{name}.left"] @ w[f"{name}.right"] for w in (mean, first))
        products = [w[f"{name}.left"] @ w[f"{name}.right"] for w in states]
        true = np.average(products, axis=0, weights=shares)
        errors.append(np.linalg.norm(product - true) / np.linalg.norm(true - start))
    return float(np.mean(errors))


def accuracies(adapter: Adapter) -> dict[str, Any]:
    """Returns the accuracy on held-out images of each board's digits, and on all."""
    images = turned(1)
    own = [accuracy(adapter, of_digits(images, digits)) for digits in DIGITS]
    return {"own": own, "all": accuracy(adapter, images)}


def to_markdown(result: Mapping[str, Any]) -> str:
    """Returns a line for each way: each board on its own digits, and on all."""
    names = [f"digits {min(digits)}-{max(digits)}" for digits in DIGITS]
    before, boards = result["factors"]["rounds"][0], result["alone"]["boards"]
    rows = [
        line("before", before["own"], [before["all"]]),
        line("alone", [b["own"][i] for i, b in enumerate(boards)], [b["all"] for b in boards]),
    ]
    for way in WAYS:
        once = result["alone"]["once"][way]
        rows.append(line(f"mean of the three, {way}, error {once['error']:.1%}", once["own"], [once["all"]]))
    for way in WAYS:
        rounds = result[way]["rounds"]
        last = np.mean([r["own"] for r in rounds[-LAST:]], axis=0)
        rows.append(line(f"together, {way}, last", rounds[-1]["own"], [rounds[-1]["all"]]))
        rows.append(
            line(f"together, {way}, mean of {LAST}", last, [np.mean([r["all"] for r in rounds[-LAST:]])])
        )
    return markdown_table(("", *names, "all ten digits"), "lrrrr", rows)


def line(name: str, own: Iterable[float], whole: Iterable[float]) -> tuple[str, ...]:
    """Returns the cells of a way."""
    return (name, *(f"{share:.1%}" for share in own), ", ".join(f"{share:.1%}" for share in whole))


def main() -> None:
    """Runs the three ways."""
    parser = new_parser(__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("runs/digits/bundle"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    if not options.json:
        result = new_result(__doc__, versions={"flwr": flwr.__version__, "ray": ray.__version__})
        result["alone"] = alone(options.bundle, options.rounds)
        result |= {way: together(options.bundle, way, options.rounds) for way in WAYS}
        write_result(RESULT, result)
    result = read_result(RESULT)
    print(to_json(result) if options.json else to_markdown(result))


if __name__ == "__main__":
    main()
