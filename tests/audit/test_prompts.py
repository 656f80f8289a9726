"""Prompt files of all kinds: rows, or a sentence with place and cure; never a crash, never a silent loss."""

from __future__ import annotations

import codecs
import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mnemoscope.audit.prompts import Columns, Prompt, PromptSet, read_prompts
from mnemoscope.errors import MnemoscopeError, UsageError

# Machines that run tests are busy at times; what is tested is never how fast.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

HARD = [
    "",
    " ",
    "a cat",
    'he said "hi", twice',
    "semi;colon\ttab",
    "emoji 🐈‍⬛ ünïcödé",
    "x" * 10_000,
    "line\nbreak",
    "\u2028",
]


@pytest.fixture
def file(tmp_path: Path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def texts(prompts: PromptSet) -> list[str]:
    return [p.text for p in prompts]


def refused(path: Path | list, columns: Columns | None = None) -> str:
    with pytest.raises(UsageError) as e:
        read_prompts(path, columns or Columns())
    return str(e.value)


# Every format holds every prompt


def as_csv(prompts: list[str], delimiter: str = ",") -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([["n", "caption"], *([i, p] for i, p in enumerate(prompts))])
    return out.getvalue()


def as_parquet(prompts: list[str]) -> bytes:
    out = io.BytesIO()
    pq.write_table(
        pa.table({"caption": prompts, "image": [b"\xff"] * len(prompts), "boxes": [[1]] * len(prompts)}), out
    )
    return out.getvalue()


FORMATS = {
    "p.jsonl": lambda ps: "".join(json.dumps({"caption": p}) + "\n" for p in ps).encode(),
    "q.jsonl": lambda ps: "\n".join(json.dumps(p, ensure_ascii=False) for p in ps).encode(),
    "p.json": lambda ps: json.dumps(ps).encode(),
    "q.json": lambda ps: json.dumps({"about": "x", "prompts": [{"Prompt": p} for p in ps]}).encode(),
    "p.csv": lambda ps: as_csv(ps).encode(),
    "q.csv": lambda ps: as_csv(ps, ";").encode("utf-8-sig"),
    "p.tsv": lambda ps: as_csv(ps, "\t").encode(),
    "p.parquet": as_parquet,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_every_prompt(name: str, file) -> None:
    assert texts(read_prompts(file(name, FORMATS[name](HARD)))) == HARD


any_text = st.text(st.characters(codec="utf-8"))
no_nul = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@pytest.mark.parametrize("name", FORMATS)
@patient
@given(data=st.data())
def test_every_format_holds_any_prompt(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prompts = data.draw(st.lists(no_nul if name.endswith("sv") else any_text, min_size=1, max_size=4, unique=True))
    path = tmp_path_factory.mktemp("prompts") / name
    path.write_bytes(FORMATS[name](prompts))
    assert texts(read_prompts(path)) == prompts


@patient
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n")), min_size=1, max_size=5))
def test_text_holds_one_prompt_per_line(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    # A first character U+FEFF would be a byte-order mark.
    lines = [line.lstrip("\ufeff") for line in lines]
    path.write_bytes("\r\n".join(lines).encode())
    wanted = list(dict.fromkeys(line for line in lines if line.strip()))
    if wanted:
        assert texts(read_prompts(path)) == wanted
    else:
        assert "holds no prompt" in refused(path)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.json", "p.csv", "p.tsv", "p.parquet"])
@patient
@given(content=st.one_of(st.binary(max_size=200), st.text('",;\n\r\t\\[]{}:ab\0 é', max_size=60).map(str.encode)))
def test_whatever_the_bytes_never_a_crash(name: str, content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("prompts") / name
    path.write_bytes(content)
    try:
        told = str(path) if len(read_prompts(path)) else "nothing was said"
    except MnemoscopeError as e:
        told = str(e)
    assert str(path) in told


# Encodings


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_believed(file, encoding: str) -> None:
    assert texts(read_prompts(file("p.txt", "ein Kätzchen\nzwei\n".encode(encoding)))) == ["ein Kätzchen", "zwei"]
    assert texts(read_prompts(file("p.csv", "caption\nein Kätzchen\n".encode(encoding)))) == ["ein Kätzchen"]


def test_big_endian_utf_16(file) -> None:
    assert texts(read_prompts(file("p.txt", codecs.BOM_UTF16_BE + "für\n".encode("utf-16-be")))) == ["für"]


def test_what_is_not_utf_8_is_named_with_line_and_cure(file) -> None:
    path = file("p.txt", "a cat\ncaf\xe9\n".encode("latin1"))
    assert refused(path) == (
        f"{path} is not UTF-8: byte 9 (0xe9, line 2) does not decode; save it as UTF-8, for instance with `iconv -f latin1 -t utf-8`."
    )


def test_utf_16_without_a_mark_and_nul_bytes_are_named(file) -> None:
    path = file("p.txt", "a cat".encode("utf-16-le"))
    assert refused(path) == (
        f"{path} has a NUL byte in line 1: it is UTF-16 without a byte-order mark, or no text; save it as UTF-8."
    )
    assert "NUL byte in line 3" in refused(file("q.csv", b"caption\na\nb\0\n"))


def test_an_escaped_nul_is_a_character_like_any_other(file) -> None:
    assert texts(read_prompts(file("p.jsonl", '"a\\u0000b"\n'))) == ["a\0b"]


def test_half_a_character_is_named(file) -> None:
    path = file("p.jsonl", '"ok"\n"a\\ud800"\n')
    assert refused(path) == f"line 2 of {path}: the prompt has half of a character (U+D800) at position 1; correct it."


# What is left out is counted


def test_blank_lines_of_text_are_counted(file) -> None:
    prompts = read_prompts(file("p.txt", "\na cat\n\n  \ntwo dogs\n"))
    assert texts(prompts) == ["a cat", "two dogs"]
    assert prompts.notes == ("3 blank lines left out",)
    prompts = read_prompts(file("p.csv", "caption\na cat\n\n"))
    assert (texts(prompts), prompts.notes) == (["a cat"], ("1 blank line left out",))


def test_repeated_prompts_are_kept_once_and_counted(file) -> None:
    prompts = read_prompts(file("p.txt", "a\nb\na\na\n"))
    assert (texts(prompts), prompts.notes) == (["a", "b"], ("2 repeated prompts left out",))
    path = file("p.jsonl", '{"prompt": "a", "group": "x"}\n{"prompt": "a", "group": "y"}\n')
    prompts = read_prompts(path)
    assert [p.group for p in prompts] == ["x"]
    assert prompts.notes == (
        "1 repeated prompt left out",
        "1 repeated prompt had another group or label than the first, which counts",
    )


def test_an_empty_prompt_is_a_prompt(file) -> None:
    assert texts(read_prompts(file("p.csv", 'caption\n""\na\n'))) == ["", "a"]
    assert texts(read_prompts(file("q.csv", "n,caption\n1,\n\n2,a\n"))) == ["", "a"]
    assert texts(read_prompts(file("p.jsonl", '""\n\n"a"\n'))) == ["", "a"]


def test_limit_keeps_the_first_and_says_so(file) -> None:
    prompts = read_prompts(file("p.txt", "a\na\nb\nc\n"), limit=2)
    assert texts(prompts) == ["a", "b"]
    assert "limit: the first 2 of 3 prompts" in prompts.notes
    assert len(read_prompts(["a"], limit=5)) == 1


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.json", "p.csv", "p.tsv"])
def test_an_empty_file_is_named(file, name: str) -> None:
    for content in ("", "\ufeff", "\n\n" if name != "p.json" else ""):
        assert refused(file(name, content)) == (
            f"{file(name, content)} holds no prompt; write one per line, or name a file that has some."
        )


# Columns


def test_columns_are_mapped(file) -> None:
    path = file("p.csv", "key;words;kind;known\n7;a cat;planted;yes\n8;two dogs;ordinary;0\n9;three;;\n")
    prompts = read_prompts(path, Columns(prompt="words", id="key", group="kind", label="known"))
    assert list(prompts) == [
        Prompt("7", "a cat", "planted", True),
        Prompt("8", "two dogs", "ordinary", False),
        Prompt("9", "three", None, None),
    ]


def test_usual_columns_are_found(file) -> None:
    path = file("p.jsonl", '{"id": 3, "Caption": "a", "group": "g", "label": true}\n{"Caption": "b"}\n')
    first, second = read_prompts(path)
    assert first == Prompt("3", "a", "g", True)
    assert (second.group, second.label) == (None, None)
    assert second.id == read_prompts(["b"]).prompts[0].id


def test_a_label_column_that_is_no_truth_is_left_alone_unless_asked_for(file) -> None:
    path = file("p.csv", "caption,label\na,cat\nb,dog\n")
    assert [p.label for p in read_prompts(path)] == [None, None]
    assert refused(path, Columns(label="label")) == (
        f"line 2 of {path}: label 'cat' is not one of true, 1, yes, false, 0, no; choose another label column."
    )


def test_a_missing_column_is_named_with_the_nearest(file) -> None:
    path = file("p.csv", "id,captions,url\n1,a,b\n")
    assert refused(path, Columns(prompt="caption")) == (
        f"{path} has no column 'caption'; name one of its columns: 'id', 'captions', 'url'. Did you mean 'captions'?"
    )
    assert refused(path) == (
        f"{path} has no column named prompt, caption or text; name one of its columns: 'id', 'captions', 'url'."
    )


def test_parquet_pictures_are_not_prompts(file) -> None:
    assert "name one of its columns: 'caption'" in refused(
        file("p.parquet", as_parquet(["a"])), Columns(prompt="image")
    )


def test_ids_tell_prompts_apart(file) -> None:
    path = file("p.csv", "id,caption\n1,a\n1,b\n")
    assert refused(path) == f"{path}: two prompts have the id '1'; make ids unique, or choose another id column."
    assert len({p.id for p in read_prompts(HARD)}) == len(HARD)


# Damage


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.jsonl", '"a"\n{"prompt": \n', "line 2 of {}: it is not JSON: Expecting value, column 12"),
        ("p.jsonl", '{"prompt": 3}', "line 1 of {}: the prompt is int '3', not text"),
        ("p.jsonl", '{"prompt": null}', "line 1 of {}: the prompt is null, not text"),
        ("p.jsonl", '{"prompt": "a"}\n{"x": "a"}', "line 2 of {} has no 'prompt'; every row needs a prompt."),
        ("p.jsonl", "[" * 100_000, "line 1 of {}: its parts lie more than 64 deep in each other"),
        ("p.jsonl", "9" * 10_000, "line 1 of {}: an integer has more than 1,000 digits"),
        ("p.json", '{"a": 1}', "{} holds dict"),
        ("p.json", "[1]", "item 1 of {}: the prompt is int '1'"),
        (
            "p.csv",
            "caption\na cat, sitting\n",
            "line 2 of {} has 2 fields and the header has 1; put quotes around prompts",
        ),
        ("p.csv", 'caption\na\n"b\n', "{} is not CSV after line 2 (unexpected end of data)"),
        ("p.csv", "a,a\n1,2\n", "{} has two columns named 'a'; rename one."),
        ("p.csv", "caption\n" + "x" * 200_000, "{} is not CSV after line 1 (field larger than field limit"),
        ("p.parquet", "PAR1", "{} is not a Parquet file"),
        ("p.png", "x", "prompt file {}: .png extension is not one of .txt, .jsonl, .json, .csv, .tsv, .parquet"),
        ("p", "x", "prompt file {}: no extension"),
    ],
)
def test_damage_is_named(file, name: str, content: str, says: str) -> None:
    path = file(name, content)
    assert refused(path).startswith(says.format(path))


def test_a_file_that_is_not_there(file, tmp_path: Path) -> None:
    file("prompts.jsonl", '"a"')
    wanted = tmp_path / "prompt.jsonl"
    assert refused(wanted) == f"prompt file {wanted} does not exist; did you mean {tmp_path / 'prompts.jsonl'}?"
    assert refused(tmp_path / "zzz" / "p.txt").endswith("does not exist; name a file of prompts.")
    assert "is a folder" in refused(tmp_path)


@pytest.mark.parametrize("ending", ["txt", "csv", "tsv", "json", "jsonl"])
def test_a_list_larger_than_memory_is_refused_by_its_size(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"p.{ending}"
    with path.open("wb") as content:
        content.truncate(6 << 30)
    assert "it has 6,442,450,944 bytes, and the limit is 1,073,741,824" in refused(path)


# Lists


def test_lists_of_texts_mappings_and_prompts() -> None:
    given = ["a", {"prompt": "b", "group": "g", "label": False}, Prompt("x", "c", "h", True)]
    a, b, c = read_prompts(given)
    assert (a.text, b.text, b.group, b.label) == ("a", "b", "g", False)
    assert c == Prompt("x", "c", "h", True)
    assert refused([]) == "a list of 0 holds no prompt; write one per line, or name a file that has some."
    assert refused([3]).startswith("item 1 of the list: the prompt is int '3'")


# What is taken for what


@pytest.mark.parametrize("first", ["a cat on a roof", "Cat", "1", "prompt of a cat"])
@pytest.mark.parametrize(("name", "encoding"), [("p.csv", "utf-8"), ("p.tsv", "utf-8-sig"), ("q.csv", "utf-16")])
def test_a_first_line_without_a_known_name_is_a_prompt_and_that_is_said(file, first, name, encoding) -> None:
    path = file(name, f"{first}\na dog\n\n".encode(encoding))
    found = read_prompts(path)
    assert texts(found) == [first, "a dog"]
    assert found.taken == (
        f"{path}: the first line ({first!r}) is taken as a prompt, because it is called neither prompt, caption nor text; if it is a "
        f"header, name it as the prompt's column (--column)",
    )
    assert texts(read_prompts(path, Columns(prompt=first))) == ["a dog"]


@pytest.mark.parametrize("header", ["prompt", "Caption", " TEXT ", '"text"'])
def test_a_first_line_with_a_known_name_is_a_header_and_that_is_said(file, header) -> None:
    path = file("p.csv", f"{header}\na cat\n")
    found = read_prompts(path)
    assert texts(found) == ["a cat"]
    assert found.taken == (
        f"{path}: column {header.strip(chr(34))!r} is taken as the prompt; the first line is read as a header",
    )


def test_every_column_that_is_read_is_named(file) -> None:
    path = file("p.csv", "\nid; caption; label ;weight\n1;a cat;yes;3\n2;a dog;no;4\n")
    found = read_prompts(path)
    assert [(p.id, p.text, p.label) for p in found] == [("1", "a cat", True), ("2", "a dog", False)]
    assert found.taken == (
        f"{path}: column ' caption' is taken as the prompt, 'id' as its id, ' label ' as its label; the first line is read as a header",
    )
    assert read_prompts(["a cat"]).taken == ()
    assert read_prompts(file("p.txt", "a cat\n")).taken == ()


def test_lines_of_prompts_without_names_above_them_are_refused_with_the_cure(file) -> None:
    path = file("p.csv", "a cat, sitting,1\na dog, lying,0\n")
    assert refused(path).endswith(
        "If its first line holds prompts already, write one with names above it, or use .txt for one plain prompt per line."
    )


def test_line_breaks_inside_quotes_are_part_of_the_prompt(file) -> None:
    assert texts(read_prompts(file("p.csv", '"a cat\non a roof"\r\n"a ""dog"""\r\n'))) == [
        "a cat\non a roof",
        'a "dog"',
    ]


# Labels and names as tables have them

nan = float("nan")


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("yes", True), ("NO", False), ("True", True), ("true ", True), ("FALSE", False), ("1", True), ("0", False), ("1.0", True),
        ("0.0", False), (1, True), (0.0, False), (True, True), ("", None), ("  ", None), (None, None), (nan, None), ("nan", None),
        ("None", None),
    ],
)  # fmt: skip
def test_a_label_is_read_as_tables_write_it(value, label) -> None:
    rows = [{"prompt": "a", "label": value}, {"prompt": "b", "label": True}, {"prompt": "c", "label": "no"}]
    assert [p.label for p in read_prompts(rows)] == [label, True, False]


@pytest.mark.parametrize("odd", ["maybe", "ja", 2, 0.5, "1.5", -1])
def test_one_odd_label_among_labels_is_named_with_its_row(odd) -> None:
    rows = [{"prompt": "a", "label": "yes"}, {"prompt": "b", "label": odd}, {"prompt": "c", "label": "no"}]
    assert refused(rows) == (
        f"item 2 of the list: label {odd!r} is not one of true, 1, yes, false, 0, no; correct it, leave it empty where nobody knows, or "
        f"rename column 'label' if it holds no labels."
    )


@pytest.mark.parametrize("values", [["cat", "dog", ""], [0, 1, 2, 3, 4], [3, 1, 7]])
def test_a_column_called_label_that_holds_something_else_is_said_to_be_left_alone(values) -> None:
    found = read_prompts([{"prompt": f"p{i}", "label": value} for i, value in enumerate(values)])
    assert {p.label for p in found} == {None}
    assert "is not read as labels" in found.notes[0]


@pytest.mark.parametrize("missing", [None, nan, "", " "])
@pytest.mark.parametrize("column", ["id", "group", "family", "swap"])
def test_a_missing_value_is_no_name(missing, column) -> None:
    first, second = read_prompts([{"prompt": "a", column: missing}, {"prompt": "b", column: "x"}])
    plain, _ = read_prompts(["a", "b"])
    assert first == plain
    assert getattr(second, column) == "x"


def test_whole_numbers_are_names_without_a_fraction() -> None:
    found = read_prompts(
        [{"prompt": "a", "id": 1.0, "group": 2.0}, {"prompt": "b", "id": nan}, {"prompt": "c", "id": 3}]
    )
    assert [(p.id, p.group) for p in found][::2] == [("1", "2"), ("3", None)]


# Parquet: only what is needed is read


def damaged(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


UNREADABLE = {
    "dates": pa.array([10**9, 1], pa.date32()),
    "times": pa.array([2**60, 1], pa.timestamp("ms")),
    "words": pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    ),
}
"""Columns that have no counterpart in Python."""


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_column_that_cannot_be_read_matters_only_where_it_is_needed(file, kind: str) -> None:
    content = damaged(pa.table({"caption": ["a cat", "a dog"], kind: UNREADABLE[kind]}))
    assert texts(read_prompts(file("p.parquet", content))) == ["a cat", "a dog"]
    for columns in (Columns(prompt=kind), Columns(id=kind)):
        said = refused(file("p.parquet", content), columns)
        assert f"column {kind!r} of " in said
        assert "cannot be read (" in said


def test_odd_kinds_of_columns_are_no_obstacle(file) -> None:
    content = damaged(
        pa.table(
            {
                "caption": pa.array(["a cat", "a dog"]).dictionary_encode(),
                "id": pa.array([1.0, None]),
                "label": pa.array([True, None]),
                "embedding": pa.array([[1.0], [2.0]]),
                "hash": pa.array([b"12", b"34"], pa.binary(2)),
                "nothing": pa.nulls(2),
                "meta": pa.array([{"a": 1}, None]),
            }
        )
    )
    first, second = read_prompts(file("p.parquet", content))
    assert (first.id, first.text, first.label) == ("1", "a cat", True)
    assert (second.text, second.label) == ("a dog", None)
    assert second.id == read_prompts(["a dog"]).prompts[0].id


def test_unneeded_columns_are_not_read(file, monkeypatch) -> None:
    path = file("p.parquet", damaged(pa.table({"caption": ["a"], "weight": [1], "url": ["x"]})))
    asked = []
    read = pq.ParquetFile.read
    monkeypatch.setattr(
        pq.ParquetFile, "read", lambda self, **more: asked.append(more["columns"]) or read(self, **more)
    )
    assert texts(read_prompts(path)) == ["a"]
    assert asked == [["caption"]]
