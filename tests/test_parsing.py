"""The one reader of JSON, JSON lines and YAML: what it refuses, and that nothing reads past it."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import mnemoscope
from mnemoscope.parsing import DEEPEST, LONGEST_LINE, ParseError, json_lines, parse_json, parse_yaml, through_json

SOURCES = sorted(Path(mnemoscope.__file__).parent.rglob("*.py"))

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda parts: st.lists(parts) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), parts),
    max_leaves=20,
)  # fmt: skip


@given(PLAIN)
def test_plain_json_is_read_as_everybody_reads_it(value: object) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False), json.dumps(value, indent=2)):
        assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1,\n "b": {"a": 2,\n\n "a": 3}}', "a is written twice (lines 2 and 4)"),
        ('{"a": 1, "a": 2}', "a is written twice (line 1)"),
        ('{"a,{\\n": 1,\n"\\u0061,{\\n": 2}', "'a,{\\n' is written twice (lines 1 and 2)"),
        ('{"a": ["a", {"b": "a"}], "c": "a",\n"a": 1}', "a is written twice (lines 1 and 2)"),
        ('{"a": NaN}', "it holds NaN"),
        ("[-Infinity]", "it holds -Infinity"),
        ("[1e999]", "larger than any"),
        ("[-1" + "0" * 400 + ".0]", "larger than any"),
        ("[18446744073709551616]", "more than 64 bits"),
        ("[-9223372036854775809]", "more than 64 bits"),
        ("[" + "9" * 5000 + "]", "more than 64 bits"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"\\udc00": 1}', "half a character"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "deep in each other"),
        ("[" * 100_000, "deep in each other"),
        (b'{"a":\n"\xff"}', "line 2 is no UTF-8"),
        ('"a"'.encode("utf-16"), "is no UTF-8"),
        ("", "it is not JSON"),
        ("{}\n{}", "line 2 is not JSON"),
    ],
)
def test_json_that_others_read_otherwise_is_refused(text: str | bytes, sentence: str) -> None:
    with pytest.raises(ParseError) as refusal:
        parse_json(text)
    assert sentence in str(refusal.value)


def test_brackets_within_texts_are_no_depth() -> None:
    assert parse_json(json.dumps(["[{" * 1000] * 3)) == ["[{" * 1000] * 3
    assert parse_json(json.dumps(['\\"[[' * 500])) == ['\\"[[' * 500]


def test_documents_of_other_programs_may_hold_infinities() -> None:
    assert parse_json("[Infinity, 1e999]", lenient=True) == [float("inf")] * 2


def test_a_byte_order_mark_is_no_content() -> None:
    assert parse_json(b"\xef\xbb\xbf[1]") == parse_yaml(b"\xef\xbb\xbf- 1") == [1]


def test_lines_end_with_a_line_feed_only() -> None:
    file = io.BytesIO('{"prompt": "a\u2028b"}\r\n\n{"prompt": "c\x0c"}'.encode().replace(b"\x0c", b"\\f"))
    assert list(json_lines(file)) == [(1, {"prompt": "a\u2028b"}), (3, {"prompt": "c\x0c"})]


def test_a_line_that_does_not_end_is_not_read_whole() -> None:
    class Endless(io.RawIOBase):
        read_bytes = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            buffer[:] = b"x" * len(buffer)
            self.read_bytes += len(buffer)
            return len(buffer)

    endless = Endless()
    with pytest.raises(ParseError, match="line 1 has more than"):
        next(json_lines(io.BufferedReader(endless)))
    assert endless.read_bytes <= 2 * LONGEST_LINE


def test_a_line_that_is_no_json_is_named() -> None:
    with pytest.raises(ParseError, match=r"line 2 cannot be read \(a is written twice"):
        list(json_lines(io.BytesIO(b'{}\n{"a": 1, "a": 2}\n')))


def test_what_comes_back_from_a_file_is_plain() -> None:
    assert through_json({"a": (1, 2), 3: None}) == {"a": [1, 2], "3": None}


@given(st.dictionaries(st.text(st.characters(codec="ascii", min_codepoint=32), min_size=1), PLAIN, max_size=5))
def test_plain_yaml_is_read_as_it_was_written(value: dict[str, object]) -> None:
    plain = through_json(value)
    assert parse_yaml(yaml.safe_dump(plain)) == plain


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rules: [a]\nrules: [b]", "rules is written twice (lines 1 and 2)"),
        ('1: a\n"1": b', "1 is written twice (lines 1 and 2)"),
        ("a: {b: 1, b: 2}", "b is written twice (line 1)"),
        (BOMB, "line 2 repeats another part by an alias"),
        ("<<: {a: 1}", "merges another part"),
        ('a: !!float ""', "line 1 has a tag"),
        ("a: !!python/object:os.system x", "line 1 has a tag"),
        ("a: !!binary aGVsbG8=", "line 1 has a tag"),
        ("a: .nan", "no number to compute with"),
        ("a: -.inf", "no number to compute with"),
        ("a: 0x" + "f" * 30, "more than 64 bits"),
        ("a: " + "9" * 5000, "more than 64 bits"),
        ("[" * 70 + "]" * 70, "deep in each other"),
        ("[" * 100_000, "not YAML"),
        ("? [a]\n: b", "a key that is no name"),
        ("a: 1\n---\nb: 2", "line 2 is not YAML"),
        ("a: b\udcfc", "half a character"),
        ("seeds: [", "is not YAML"),
        (b"\xff\xfe\xfa", "no UTF-8"),
        ("x" * (2 << 20), "the limit is"),
    ],
)
def test_yaml_that_hides_something_is_refused(text: str | bytes, sentence: str) -> None:
    with pytest.raises(ParseError) as refusal:
        parse_yaml(text)
    assert sentence in str(refusal.value)


def test_dates_and_empty_documents_of_yaml() -> None:
    assert parse_yaml("until: 2026-13-45") == {"until": "2026-13-45"}
    assert parse_yaml("until: 2026-01-05") == {"until": "2026-01-05"}
    assert parse_yaml("# nothing") is None


def test_no_message_quotes_a_value() -> None:
    for text in ("token: hf_abcdefghij: x", "token: 'hf_abcdefghij", "- token: @hf_abcdefghij"):
        with pytest.raises(ParseError) as refusal:
            parse_yaml(text)
        assert "hf_" not in str(refusal.value)


RAW = {
    "json": {"load", "loads", "JSONDecoder"},
    "yaml": {"load", "safe_load", "load_all", "safe_load_all", "full_load", "unsafe_load", "compose", "parse"},
    "orjson": {"loads"},
}


def _raw_readers(tree: ast.AST) -> list[int]:
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.attr in RAW.get(node.value.id, ()):
                lines.append(node.lineno)
            if node.attr in ("model_validate_json", "parse_raw"):
                lines.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module in RAW:
            lines += [node.lineno for name in node.names if name.name in RAW[str(node.module)]]
    return lines


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "parsing.py"], ids=lambda p: p.stem)
def test_nothing_reads_documents_past_it(path: Path) -> None:
    lines = _raw_readers(ast.parse(path.read_text(encoding="utf-8")))
    assert not lines, f"{path}, lines {lines}: read JSON and YAML with mnemoscope.parsing"
