"""JSON that anybody may have written."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from wasi_export.errors import MalformedError
from wasi_export.untrusted import document
from wasi_export.untrusted.document import parse_document, read_document


class Note(BaseModel):
    text: str = ""
    number: float = 0
    parts: list[dict[str, str]] = []


@given(st.text(st.characters(exclude_categories=("Cc", "Cs"))), st.floats(-1e299, 1e299))
def test_what_is_written_is_read_back(text: str, number: float) -> None:
    note = Note(text=text, number=number, parts=[{text: text}])
    assert parse_document(note.model_dump_json(), Note) == note


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ('{"text": "a", "text": "b"}', "'text' stands twice"),
        ('{"parts": [{"a": "b", "a": "b"}]}', "'a' stands twice"),
        ('{"number": NaN}', "NaN is no number"),
        ('{"number": -Infinity}', "-Infinity is no number"),
        ('{"text": "\\u001b[2J"}', "control characters"),
        ('{"parts": [{"\\u0007": ""}]}', "control characters"),
        ('{"text": "\x9b2J"}', "control characters"),
        ("[" * 100_000, "Invalid JSON"),
        ('{"parts": ' + "[" * 1000 + "]" * 1000 + "}", "Invalid JSON"),
        ('{"number": 1' + "0" * 5000 + "}", "digits|number"),
        ('{"number": 1e999}', "number"),
        ('{"number": "1"}', "'number': .*valid number"),
        ("", "Invalid JSON"),
        (b"\xff\xfe", "Invalid JSON"),
        ('{"number": "many"}', "'number': .*valid number"),
    ],
)
def test_a_document_that_two_readers_would_read_differently_is_refused(
    data: str | bytes, reason: str
) -> None:
    with pytest.raises(MalformedError, match=reason) as caught:
        parse_document(data, Note)
    assert str(caught.value).isprintable()


def test_a_text_of_several_lines_is_no_control_character() -> None:
    assert parse_document(json.dumps({"text": "a\n\tb"}), Note).text == "a\n\tb"


def test_a_document_that_is_too_large_is_not_parsed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "note.json").write_text('{"text": "12345678"}')
    assert read_document(tmp_path / "note.json", Note).text == "12345678"
    monkeypatch.setattr(document, "MAX_BYTES", 19)
    with pytest.raises(MalformedError, match="it has 20 bytes, at most 19 are read"):
        read_document(tmp_path / "note.json", Note)
