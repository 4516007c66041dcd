"""What a refusal says, and what is just within the limits of a document."""

from pathlib import Path

import pytest
from pydantic import BaseModel, JsonValue, RootModel

from wasi_export.errors import MalformedError
from wasi_export.untrusted import document
from wasi_export.untrusted.document import MAX_BYTES, parse_document, read_document, read_some

Anything = RootModel[JsonValue]


class Pair(BaseModel):
    one: int
    two: int


class Nested(BaseModel):
    pair: Pair


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"one": 1}', r"'two': Field required"),
        ('{"one": "x", "two": "y"}', r"'one': Input should be a valid integer \(and 1 more\)"),
        ("[]", r"Input should be an object"),
    ],
)
def test_the_first_thing_that_is_wrong_is_told_and_how_much_more(text, reason):
    with pytest.raises(MalformedError, match=f"^{reason}$"):
        parse_document(text, Pair)


def test_it_is_told_where_it_is_wrong():
    with pytest.raises(MalformedError, match=r"^'pair\.two': Field required$"):
        parse_document('{"pair": {"one": 1}}', Nested)


@pytest.mark.parametrize(("size", "is_read"), [(12, True), (13, False)])
def test_a_document_is_as_large_as_the_limit_and_no_larger(size, is_read, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(document, "MAX_BYTES", 12)
    path = tmp_path / "x.json"
    path.write_text(f'"{"x" * (size - 2)}"')
    assert len(read_some(path)) == min(size, 13)
    if is_read:
        assert read_document(path, Anything).root == "x" * 10
    else:
        with pytest.raises(MalformedError, match="it has 13 bytes, at most 12 are read"):
            read_document(path, Anything)


def test_no_more_is_read_than_tells_that_it_is_too_large(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(document, "MAX_BYTES", 12)
    path = tmp_path / "x.json"
    path.write_bytes(bytes(1000))
    assert len(read_some(path)) == 13


def test_the_limit_is_64_mib():
    assert MAX_BYTES == 67108864


@pytest.mark.parametrize("number", ["1e300", "-1e300", "1e999", "1" * 301, f"-{'9' * 40}{'0' * 300}"])
def test_a_number_that_is_too_large_is_none_and_its_beginning_is_told(number):
    with pytest.raises(MalformedError, match=f"^{number[:20]} is no number$"):
        parse_document(number, Anything)


@pytest.mark.parametrize("number", ["9.9e299", "-9.9e299", "0", "1" * 300])
def test_a_large_number_is_one(number):
    parse_document(number, Anything)


def test_a_text_with_control_characters_is_told_as_far_as_60_characters():
    with pytest.raises(MalformedError, match=rf"^a text has control characters: '\\x1b{'x' * 59}'$"):
        parse_document(f'["\\u001b{"x" * 99}"]', Anything)
    parse_document('["\\u001b"]', Anything, any_text=True)


def test_of_two_reasons_the_first_is_told():
    with pytest.raises(MalformedError, match=r"^'one': Input should be a valid integer \(and 1 more\)$"):
        parse_document('{"one": "x"}', Pair)


def test_a_file_is_read_without_control_characters_unless_it_is_said(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text('"\\u001b"')
    with pytest.raises(MalformedError, match="control characters"):
        read_document(path, Anything)
    assert read_document(path, Anything, any_text=True).root == "\x1b"
