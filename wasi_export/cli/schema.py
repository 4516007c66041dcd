"""`wasi-export schema`: what the JSON of the other commands looks like."""

from pathlib import Path
from typing import Annotated

import typer

from wasi_export.cli._console import JsonFlag, exit_codes, print_json, print_table


@exit_codes
def schema(
    name: Annotated[str | None, typer.Argument(help="A document. Default: list them.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write NAME.json into this folder, or all of them.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the files.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Print the JSON Schema of a document: of what a command prints with --json, and of each JSON file."""
    import difflib

    from wasi_export.cli._documents import SchemaList, WrittenFiles
    from wasi_export.cli._schemas import DOCUMENTS, schema_file, schema_of, write_schema
    from wasi_export.durable import require_new
    from wasi_export.errors import UsageError

    if name is not None and name not in DOCUMENTS:
        near = difflib.get_close_matches(name, DOCUMENTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(DOCUMENTS)}"
        raise UsageError(f"no document {name!r}, {hint}")
    if out is not None:
        wanted = tuple(DOCUMENTS) if name is None else (name,)
        for document in wanted:
            require_new(schema_file(document, out), force=force)
        written = tuple(write_schema(document, out) for document in wanted)
        if as_json:
            print_json(WrittenFiles(written=written))
        else:
            typer.echo("\n".join(map(str, written)))
    elif name is not None:
        print_json(schema_of(name))
    elif as_json:
        print_json(SchemaList(documents={key: document.origin for key, document in DOCUMENTS.items()}))
    else:
        rows = [(key, document.origin) for key, document in DOCUMENTS.items()]
        print_table("documents", ("name", "printed or written by"), rows, align="ll")
