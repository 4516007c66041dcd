"""From a trained model to the folder of a finished run, and back."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from wasi_export.config import Config
from wasi_export.durable import file_sha256, write_bytes
from wasi_export.errors import IntegrityError, MalformedError
from wasi_export.manifest import CONFIG
from wasi_export.ranks import Plan
from wasi_export.run_folder import FACTS, OPTIMIZER, PLAN, WEIGHTS, RunFacts
from wasi_export.subspace.inject import install_layers
from wasi_export.training.models import create_model
from wasi_export.training.resume import CHECKPOINT
from wasi_export.untrusted.document import read_document


@dataclass(frozen=True)
class Run:
    """A finished run, its model in evaluation mode on the processor."""

    path: Path
    model: nn.Module
    config: Config
    facts: RunFacts
    plan: Plan | None
    """The factored layers; None for a dense run."""
    optimizer: dict[str, Tensor] | None
    """The state that training on a board ended with; None of a run that was trained here."""


def save_run(run_dir: Path, model: nn.Module, config: Config, facts: RunFacts) -> RunFacts:
    """Writes weights, configuration and facts of a finished run; returns the facts with the weights' hash."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_bytes(run_dir / WEIGHTS, save(state))
    write_config(run_dir, config)
    facts = facts.model_copy(update={"weights_sha256": file_sha256(run_dir / WEIGHTS)})
    write_bytes(run_dir / FACTS, facts.model_dump_json(indent=2).encode())
    return facts


def write_config(run_dir: Path, config: Config) -> None:
    """Writes the configuration of a run; export reads its own section from there."""
    write_bytes(run_dir / CONFIG, config.to_toml().encode())


def read_facts(run_dir: Path) -> RunFacts | None:
    """Returns the facts of a finished run whose weights are whole; None where no finished run is.

    Raises:
        IntegrityError: run.json or the weights are not what was written.
    """
    try:
        facts = read_document(run_dir / FACTS, RunFacts)
        digest = file_sha256(run_dir / WEIGHTS)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, MalformedError) as error:
        raise IntegrityError(f"{run_dir / FACTS} is not of a run: {error}: train again") from error
    if digest != facts.weights_sha256:
        raise IntegrityError(
            f"{run_dir / WEIGHTS} has sha256 {digest[:12]}…, "
            f"{FACTS} says {facts.weights_sha256[:12]}…: train again"
        )
    return facts


def require_facts(run_dir: Path) -> RunFacts:
    """Returns the facts of the finished run in a folder.

    Raises:
        IntegrityError: there is none, or it is not what was written.
    """
    facts = read_facts(run_dir)
    if facts is None and (run_dir / CHECKPOINT).exists():
        raise IntegrityError(f"{run_dir} holds an unfinished run: the same train command resumes it")
    if facts is None:
        raise IntegrityError(
            f"{run_dir} holds no finished run: give the folder that `wasi-export train` wrote"
        )
    return facts


def load_run(run_dir: Path) -> Run:
    """Returns the finished run in a folder, as a torch model. Nothing is downloaded.

    Raises:
        IntegrityError: the folder holds no finished run, or a file of it is not what was written.
    """
    facts = require_facts(run_dir)
    config = Config.from_toml(run_dir / CONFIG)
    bare = config.model.model_copy(update={"pretrained": False, "checkpoint": None})
    model = create_model(bare, len(facts.classes))
    plan = Plan.load(run_dir / PLAN) if facts.method == "subspace" else None
    if plan is not None:
        install_layers(model, plan)
    try:
        model.load_state_dict(load((run_dir / WEIGHTS).read_bytes()))
    except (RuntimeError, SafetensorError) as error:
        lines = " ".join(line.strip() for line in str(error).splitlines()[:3])
        raise IntegrityError(f"{run_dir}: the weights do not fit the configuration: {lines}") from error
    return Run(run_dir, model.eval(), config, facts, plan, _read_optimizer(run_dir / OPTIMIZER))


def _read_optimizer(path: Path) -> dict[str, Tensor] | None:
    if not path.exists():
        return None
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise IntegrityError(
            f"{path} holds no whole state of an optimiser ({error}): make the run again, or delete the file "
            "to go on without"
        ) from error
