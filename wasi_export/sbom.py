"""A bill of materials of a bundle, in CycloneDX: the model, its files, and what it was made with.

All of it is in the manifest, so the same bundle gives the same bytes.
Source: https://cyclonedx.org/docs/1.6/json/
"""

import json
import uuid
from datetime import datetime

from wasi_export import __version__
from wasi_export._extras import require
from wasi_export.artifact import Bundle
from wasi_export.durable import file_sha256
from wasi_export.manifest import MANIFEST, MODEL

EXTRA = "trust"
NOT_FROM_PYPI = ("python",)


def to_cyclonedx(bundle: Bundle) -> str:
    """Returns the document as indented JSON.

    Raises:
        MissingExtraError: the extra is not installed.
    """
    require("cyclonedx", extra=EXTRA)
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion
    from packageurl import PackageURL

    def sha256(digest: str) -> list[HashType]:
        return [HashType(alg=HashAlgorithm.SHA_256, content=digest)]

    def pypi(name: str, version: str) -> Component:
        kind = ComponentType.PLATFORM if name in NOT_FROM_PYPI else ComponentType.LIBRARY
        purl = None if name in NOT_FROM_PYPI else PackageURL("pypi", name=name, version=version)
        return Component(name=name, version=version, type=kind, purl=purl, bom_ref=name)

    manifest = bundle.manifest
    facts = {
        "architecture": manifest.model.name,
        "method": manifest.model.method,
        "parameters": str(manifest.model.parameters),
        "classes": str(len(manifest.classes)),
        "opset": str(manifest.opset),
        "runtime": f"onnxruntime>={manifest.min_onnxruntime}",
        "training data": manifest.data_fingerprint or "not trained here",
        **{f"metric {name}": f"{value:g}" for name, value in manifest.metrics.items()},
    }
    model = Component(
        name=manifest.name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        hashes=sha256(manifest.files[MODEL].sha256),
        properties=[Property(name=f"wasi-export:{name}", value=value) for name, value in facts.items()],
    )
    files = [
        Component(name=name, type=ComponentType.FILE, bom_ref=f"file:{name}", hashes=sha256(entry.sha256))
        for name, entry in manifest.files.items()
    ]
    tools = [pypi(name, version) for name, version in manifest.tools.items()]
    digest = file_sha256(bundle.path / MANIFEST)
    bom = Bom(
        components=[*files, *tools],
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"wasi-export:{digest}"),
    )
    bom.metadata.component = model
    bom.metadata.timestamp = datetime.fromisoformat(manifest.created)
    bom.metadata.tools.components.add(pypi("wasi-export", __version__))
    bom.register_dependency(model, files)
    text = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string()
    return json.dumps(json.loads(text), indent=2) + "\n"
