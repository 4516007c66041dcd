"""A model card of a bundle: what the model is, how it was made and checked, in Markdown for people and hubs.

All of it is in the manifest, and in a report where one is given; what neither knows is said to be unknown.
Source: https://huggingface.co/docs/hub/model-cards
"""

from importlib.resources import files

from wasi_export._extras import require
from wasi_export.artifact import Bundle
from wasi_export.manifest import MODEL
from wasi_export.report import Report
from wasi_export.views import cell, check_values


def to_model_card(bundle: Bundle, report: Report | None = None) -> str:
    """Returns the card; with a report of the bundle, what was checked is in it.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    jinja2 = require("jinja2", extra="report")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["cell"] = lambda text: cell(str(text))
    template = environment.from_string(files(__name__).joinpath("card.md.j2").read_text(encoding="utf-8"))
    manifest = bundle.manifest
    layers = manifest.model.layers
    card: str = template.render(
        manifest=manifest,
        base_model=_base_model(manifest.model.name),
        size_mb=manifest.files[MODEL].size_bytes / 1e6,
        factored=[layer for layer in layers if layer.rank is not None],
        layers=layers,
        report=report,
        checks=[(check, *check_values(check)) for check in report.checks] if report else [],
    )
    return card


def _base_model(name: str) -> str:
    """Returns what the hub calls the timm model of a name."""
    hub, _, found = name.partition(":")
    return found if hub in ("hf-hub", "hf_hub") else f"timm/{name}"
