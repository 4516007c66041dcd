"""The JSON documents of wasi-export by name, and the JSON Schema of each, made from the code.

Of what we print and write the schema is that of a new document, in which every key is there. Of what people
write, it is that of a file which may leave keys out.
"""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode

from wasi_export._extras import require
from wasi_export.durable import write_bytes

DIALECT = "https://json-schema.org/draft/2020-12/schema"


class Document(NamedTuple):
    """Where the model of a document is, and where the document comes from."""

    module: str
    model: str
    origin: str
    extra: str = ""
    """Of the packages that its module needs."""
    written_by_people: bool = False


DOCUMENTS: Mapping[str, Document] = {
    "adapt": Document("wasi_export.runtimes.adapt", "AdaptProgress", "adapt --json"),
    "benchmark": Document("wasi_export.report", "Benchmark", "bench --json"),
    "config": Document("wasi_export.config", "Config", "a configuration, as TOML", written_by_people=True),
    "doctor": Document("wasi_export.runtimes.doctor", "Examination", "doctor --json"),
    "epoch": Document("wasi_export.training.resume", "EpochMetrics", "a line of metrics.jsonl", "train"),
    "error": Document("wasi_export.cli._documents", "ErrorDocument", "every command with --json that fails"),
    "jobs": Document("wasi_export.cli._documents", "JobNames", "run --dry-run --json of a sweep"),
    "manifest": Document("wasi_export.manifest", "Manifest", "manifest.json; export --json, inspect --json"),
    "memory": Document("wasi_export.cli._summary", "StepMemoryPair", "memory.json beside a run's report"),
    "merge": Document("wasi_export.cli._merge", "MergeResult", "merge --json", "merge"),
    "page": Document("wasi_export.cli._documents", "WrittenPage", "report --json"),
    "plan": Document("wasi_export.ranks", "Plan", "plan.json"),
    "planned-model": Document("wasi_export.training.planning", "PlannedModel", "plan --json", "train"),
    "profile": Document("wasi_export.training.profile", "Profile", "profile.json", "train"),
    "profiled-run": Document(
        "wasi_export.training.profile", "ProfiledRun", "train --profile --json", "train"
    ),
    "report": Document("wasi_export.report", "Report", "report.json; validate --json"),
    "run": Document("wasi_export.run_folder", "RunFacts", "run.json; train --json, merge --to torch --json"),
    "summary": Document("wasi_export.cli._summary", "RunSummary", "summary.json; run --json"),
    "schemas": Document("wasi_export.cli._documents", "SchemaList", "schema --json"),
    "signed": Document("wasi_export.cli._documents", "SignedBundle", "sign --json"),
    "sweep": Document("wasi_export.cli._sweep_table", "SweepTable", "sweep.json; run --json of a sweep"),
    "targets": Document("wasi_export.cli._target_results", "TargetResults", "several --target with --json"),
    "thresholds": Document("wasi_export.config", "Thresholds", "thresholds.toml", written_by_people=True),
    "train-graph": Document("wasi_export.manifest", "TrainingGraph", "train-graph --json"),
    "verified": Document("wasi_export.cli._documents", "VerifiedBundle", "verify --json"),
    "written": Document("wasi_export.cli._documents", "WrittenFile", "card --out --json, sbom --out --json"),
    "written-files": Document("wasi_export.cli._documents", "WrittenFiles", "schema --out --json"),
}


def document_model(name: str) -> type[BaseModel]:
    """Returns the model of a document.

    Raises:
        MissingExtraError: it needs packages that are not installed.
    """
    module, model, _, extra, _ = DOCUMENTS[name]
    found: type[BaseModel] = getattr(require(module, extra=extra) if extra else import_module(module), model)
    return found


def schema_of(name: str) -> dict[str, Any]:
    """Returns the JSON Schema of a document.

    Raises:
        MissingExtraError: its model needs packages that are not installed.
    """
    mode: JsonSchemaMode = "validation" if DOCUMENTS[name].written_by_people else "serialization"
    return {"$schema": DIALECT} | document_model(name).model_json_schema(mode=mode)


def schema_file(name: str, folder: Path) -> Path:
    """Returns where the schema of a document is written."""
    return folder / f"{name}.json"


def write_schema(name: str, folder: Path) -> Path:
    """Writes NAME.json into a folder, over what was there, and returns where it is.

    Raises:
        MissingExtraError: its model needs packages that are not installed.
        UsageError: it cannot be written.
    """
    path = schema_file(name, folder)
    write_bytes(path, (json.dumps(schema_of(name), indent=2, ensure_ascii=False) + "\n").encode())
    return path
