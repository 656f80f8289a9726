"""The run folder: nothing that was written is lost, nothing that was torn is a result."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mnemoscope.errors import RunError
from mnemoscope.records.schema import Manifest, Nearest, Row, Score
from mnemoscope.records.store import OutFolder, Run, Writer, differences, digest, free_folder, sample_id, write_whole

# Machines that run tests are busy at times; what is tested is never how fast.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def row(id: str, **changes: object) -> Row:
    facts = {"id": id, "prompt_id": f"p-{id}", "prompt": f"prompt {id}", "seed": 0, "status": "ok"}
    return Row.model_validate(facts | changes)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(tmp_path / "run", Manifest(asked=3))


def write(run: Run, *rows: Row, shard: int | None = None) -> None:
    with Writer(run, shard) as writer:
        writer.append(rows)


def ids(run: Run) -> list[str]:
    return [r.id for r in run.rows()]


# Rows come back


floats = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec="utf-8"))


@patient
@given(st.lists(st.tuples(texts, floats, st.lists(floats, max_size=5)), min_size=1, max_size=5))
def test_rows_come_back_exactly(tmp_path_factory: pytest.TempPathFactory, content: list) -> None:
    run = Run.open(tmp_path_factory.mktemp("runs") / "run", Manifest())
    rows = [
        row(str(i), prompt=text, scores={"magnitude": Score(value=value, space="eps", per_step=steps)})
        for i, (text, value, steps) in enumerate(content)
    ]
    write(run, *rows)
    assert list(Run(run.folder).rows()) == rows


def test_what_json_cannot_hold_is_refused_before_it_is_written() -> None:
    with pytest.raises(ValueError, match="finite"):
        Score(value=float("nan"), space="eps")
    with pytest.raises(ValueError, match="finite"):
        Score(value=1.0, space="eps", per_step=[float("inf")])
    with pytest.raises(ValueError, match="finite"):
        Nearest(reference="a", similarity=float("nan"), descriptor="pixels")


def test_of_several_rows_the_first_that_is_ok_counts(run: Run) -> None:
    write(run, row("a", status="error", error="first"), row("b", note="first"), row("c", status="error", error="first"))
    write(run, row("c", status="error", error="last"), row("b", note="second"), row("a", note="at last"))
    write(run, row("b", status="error"))
    assert {r.id: r.error or r.note for r in run.rows()} == {"a": "at last", "b": "first", "c": "last"}
    assert len(ids(run)) == 3
    assert run.finished() == {"a", "b"}
    assert run.outcomes() == {"a": "ok", "b": "ok", "c": "error"}


def test_shards_are_read_together_in_the_order_of_their_numbers(run: Run) -> None:
    for shard in (10, 2, None, 0):
        write(run, row(f"of {shard}"), row("shared", note=str(shard)), shard=shard)
    (run.folder / "samples-old.jsonl").write_text("not ours\n")
    assert [p.name for p in run.files()] == ["samples.jsonl", "samples-0.jsonl", "samples-2.jsonl", "samples-10.jsonl"]
    assert ids(run) == ["of None", "shared", "of 0", "of 2", "of 10"]
    assert next(r for r in run.rows() if r.id == "shared").note == "None"


def test_memory_does_not_grow_with_the_size_of_rows(run: Run) -> None:
    steps = [0.123456789] * 1500
    with Writer(run) as writer:
        for i in range(60):
            writer.append([row(str(i), scores={"m": Score(value=1.0, space="eps", per_step=steps)})])
    size = sum(p.stat().st_size for p in run.files())
    tracemalloc.start()
    assert sum(1 for _ in run.rows()) == 60
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 4


# Torn, damaged, full


def test_resume_after_a_torn_line(run: Run) -> None:
    write(run, row("a"), row("b"))
    file = run.folder / "samples.jsonl"
    file.write_bytes(file.read_bytes()[:-4])
    assert run.finished() == {"a"}
    write(run, row("b"))
    assert ids(run) == ["a", "b"]
    assert len(file.read_bytes().splitlines()) == 2


def test_a_kill_at_any_byte_leaves_whole_rows(run: Run) -> None:
    write(run, row("a"), row("b", prompt="zwölf 🐈"), row("c"))
    file = run.folder / "samples.jsonl"
    whole = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        survivors = ["a", "b", "c"][: sum(end <= cut for end in ends)]
        assert ids(run) == survivors
        write(run, row("d"))
        assert ids(run) == [*survivors, "d"]


@pytest.mark.parametrize(
    "tail", [b"\0\0\0\0", b"[]\n", b'{"id": 3, "status": "ok"}\n', b"\xff\xfe\n", b"[" * 5000 + b"\n"]
)
def test_a_last_line_that_is_no_row_is_forgiven(run: Run, tail: bytes) -> None:
    write(run, row("a"))
    with (run.folder / "samples.jsonl").open("ab") as file:
        file.write(tail)
    assert ids(run) == ["a"]
    write(run, row("b"))
    assert ids(run) == ["a", "b"]


def test_a_line_that_is_damaged_in_the_middle_is_named(run: Run) -> None:
    write(run, row("a"), row("b"), row("c"))
    file = run.folder / "samples.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1][:-9] + b"\n" + lines[2])
    for read in (lambda: ids(run), run.finished, lambda: write(run, row("d"))):
        with pytest.raises(RunError) as e:
            read()
        assert str(e.value) == (
            f"line 2 of {file} is damaged (it is not JSON: Invalid control character at, column 108); delete that line and repeat the "
            f"command: only its sample is computed again."
        )
    assert file.read_bytes().endswith(lines[2])  # nothing was cut off behind the damage


def test_a_row_with_an_unknown_key_is_named(run: Run) -> None:
    write(run, row("a"))
    file = run.folder / "samples.jsonl"
    line = json.loads(file.read_text()) | {"id": "b", "typo": 1}
    file.write_text(file.read_text() + json.dumps(line) + "\n")
    with pytest.raises(RunError, match=r"line 2 of .*typo"):
        ids(run)


@pytest.mark.parametrize("written", [0, 7])
def test_a_full_disk_costs_one_batch(run: Run, monkeypatch: pytest.MonkeyPatch, written: int) -> None:
    with Writer(run) as writer:
        writer.append([row("a")])
        plain, calls = os.write, iter([written, 0])

        def full(file: int, data: bytes) -> int:
            if n := next(calls, 0):
                return plain(file, bytes(data[:n]))
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(RunError) as e:
                writer.append([row("b"), row("c")])
        assert str(e.value) == (
            f"the disk that holds {run.folder} is full; everything written so far is kept: free some space, and the same command continues."
        )
        assert ids(run) == ["a"]
        writer.append([row("b")])  # space was freed
    assert ids(run) == ["a", "b"]


def test_a_full_disk_leaves_the_old_manifest_and_no_rubbish(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = (run.folder / "run.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(RunError, match="full"):
            run.update(status="done")
        with Writer(run) as writer, pytest.raises(RunError, match="full"):
            writer.save("images/a.webp", b"picture")
    assert (run.folder / "run.json").read_bytes() == before
    assert not [p for p in run.folder.rglob("*") if p.is_file() and p.name.startswith((".run", ".a"))]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        Run.open(tmp_path / "file" / "run", Manifest())


# One writer at a time


def test_two_writers_do_not_share_a_file(run: Run) -> None:
    with Writer(run) as writer:
        with pytest.raises(RunError) as e, Writer(run):
            pass
        assert str(e.value) == (
            f"{run.folder} is being written by another process; wait for it to end, or choose another folder."
        )
        with Writer(run, shard=1) as other:  # another file is another lock
            other.append([row("b")])
        writer.append([row("a")])
    assert ids(run) == ["a", "b"]


HOLD = """
import sys, time
from mnemoscope.records.store import Run, Writer
with Writer(Run(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_free(run: Run) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run.folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout:
        try:
            assert process.stdout.readline() == "locked\n"
            with pytest.raises(RunError, match="another process"), Writer(run):
                pass
        finally:
            process.kill()
    write(run, row("a"))
    assert ids(run) == ["a"]


# The manifest


def test_the_manifest_comes_back_and_counts_add_up(run: Run) -> None:
    other = Run(run.folder)
    run.update(forwards=3, notes=["a note"])
    other.update(forwards=4, status="done")
    stored = Run(run.folder).manifest
    assert (stored.forwards, stored.notes, stored.status) == (7, ["a note"], "done")
    assert stored == other.manifest


def test_opening_again_keeps_what_is_there(run: Run) -> None:
    write(run, row("a"))
    again = Run.open(run.folder, Manifest(asked=99))
    assert again.manifest.asked == 3
    assert ids(again) == ["a"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"[1]", "is not a manifest"),
        (b'{"format": 99}', "has format 99, and this version reads up to 1; update mnemoscope."),
        (b'{"asked": "many"}', "is not a manifest (asked: "),
        (b'{"colour": 1}', "is not a manifest (colour: "),
    ],
)
def test_a_manifest_that_cannot_be_read_is_one_sentence(run: Run, content: bytes, says: str) -> None:
    (run.folder / "run.json").write_bytes(content)
    with pytest.raises(RunError) as e:
        Run(run.folder)
    assert says in str(e.value)
    assert str(run.folder) in str(e.value)


def test_a_folder_that_holds_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run \(no run.json\)"):
        Run(tmp_path)
    with pytest.raises(RunError, match="holds no run"):
        Run(tmp_path / "nowhere")
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match=r"holds 'thesis.tex' and no run; choose a new folder"):
        Run.open(tmp_path, Manifest())
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["thesis.tex"]


def test_a_fresh_start_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    assert free_folder(tmp_path / "run") == tmp_path / "run"
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir()
    assert free_folder(tmp_path / "run") == tmp_path / "run-3"


# Ids


def test_ids_depend_on_content_alone() -> None:
    setting = {"guidance": 7.5, "target": {"weights": "abc"}}
    key = sample_id("a cat", 0, setting)
    assert key == "92f7f86c291c230f00c9"  # pinned: a change would orphan every stored run
    assert key == sample_id("a cat", 0, {"target": {"weights": "abc"}, "guidance": 7.5})
    assert key == sample_id("a cat", 0, digest(setting))
    others = [
        sample_id("a cat", 1, setting),
        sample_id("a cat ", 0, setting),
        sample_id("a cat", 0, setting | {"guidance": 7}),
    ]
    assert len({key, *others}) == 4


@patient
@given(st.text(), st.text(), st.integers(0, 9), st.integers(0, 9))
def test_different_samples_have_different_ids(a: str, b: str, i: int, j: int) -> None:
    assert (sample_id(a, i, "s") == sample_id(b, j, "s")) == ((a, i) == (b, j))


def test_differences_are_named_by_their_path() -> None:
    was = {"guidance": 7.5, "target": {"dtype": "float16", "weights": "a"}, "window": [0, 1], "old": 1}
    now = {"guidance": 3.0, "target": {"dtype": "float32", "weights": "a"}, "window": (0, 1), "new": None}
    assert differences(was, was) == []
    assert differences(was, now) == [
        "guidance: was 7.5, now 3.0",
        "old: was 1, now null",
        'target.dtype: was "float16", now "float32"',
    ]


# Several folders


def test_folders_of_shards_merge_into_one_run(tmp_path: Path) -> None:
    runs = [Run.open(tmp_path / f"{k}", Manifest(asked=3, forwards=10 + k)) for k in range(2)]
    write(runs[0], row("a"), row("b", status="error", error="x"), shard=0)
    write(runs[1], row("b"), row("c"), shard=1)
    with Writer(runs[1], 1) as writer:
        writer.save("images/c.webp", b"picture")
    merged = Run.merge(tmp_path / "all", runs)
    assert ids(merged) == ["a", "b", "c"]
    assert (merged.manifest.status, merged.manifest.forwards, merged.manifest.asked) == ("done", 21, 3)
    assert (merged.folder / "images/c.webp").read_bytes() == b"picture"
    with pytest.raises(RunError, match="already holds a run"):
        Run.merge(tmp_path / "all", runs)
    half = Run.merge(tmp_path / "half", runs[:1])
    assert half.manifest.status == "incomplete"


@pytest.mark.parametrize(
    "name", ["run.json", "samples.jsonl", "thresholds.json", "images/a.webp", "images", "measures"]
)
@pytest.mark.parametrize("pipe", [True, False], ids=["pipe", "link"])
def test_files_of_a_run_lie_in_it(tmp_path: Path, name: str, pipe: bool) -> None:
    run, elsewhere = Run.open(tmp_path / "run", Manifest(asked=3)), tmp_path / "elsewhere"
    write(run, row("a"))
    for file in ("thresholds.json", "images/a.webp", "measures/measure.json"):
        write_whole(run.folder / file, b"{}")
    path = run.folder / name
    path.rename(elsewhere)
    if pipe and not elsewhere.is_dir():
        os.mkfifo(path)
    else:
        path.symlink_to(elsewhere)
    with pytest.raises(
        RunError, match=r"run\.json|samples\.jsonl|thresholds\.json|images/a\.webp|measures/measure\.json"
    ):
        Run.merge(tmp_path / "all", [Run(run.folder)])


def part(folder: Path, *rows: Row, **manifest: object) -> Run:
    """A shard's folder, closed as an audit closes it."""
    run = Run.open(folder, Manifest.model_validate({"asked": 3} | manifest))
    write(run, *rows)
    run.update(notes=[*run.manifest.notes, *run.tally().notes], status="incomplete")
    return run


def test_a_tally_counts_what_is_open(run: Run) -> None:
    write(run, row("a", tokens_dropped=2), row("b", status="error", error="x"))
    assert run.tally().notes == [
        "1 of 2 prompts were truncated by the text encoder",
        "1 of 3 samples failed; the same command tries them again",
        "1 of 3 samples have not been run yet; the same command continues",
    ]
    assert not run.tally().complete
    write(run, row("b"), row("c"))
    assert (run.tally().ok, run.tally().complete) == (3, True)


def test_a_merged_run_says_what_is_open_now(tmp_path: Path) -> None:
    own = {"notes": ["a note"], "started": "2026-01-02", "ended": "2026-01-03", "doses": {"planted": 8}}
    later = {
        "notes": ["a note", "another"],
        "started": "2026-01-01",
        "ended": "2026-01-04",
        "accepted": ["seeds: was 4, now 2"],
    }
    runs = [
        part(tmp_path / "0", row("a"), row("b", status="error", error="x"), **own),
        part(tmp_path / "1", row("b", tokens_dropped=1), row("c"), **later),
    ]
    assert len(runs[0].manifest.notes) == 3
    merged = Run.merge(tmp_path / "all", runs).manifest
    assert merged.notes == ["a note", "another", "1 of 3 prompts were truncated by the text encoder"]
    assert (merged.started, merged.ended, merged.doses) == ("2026-01-01", "2026-01-04", {"planted": 8})
    assert merged.accepted == ["seeds: was 4, now 2"]
    assert Run.merge(tmp_path / "one", runs[:1]).manifest.notes == [
        "a note",
        "1 of 3 samples failed; the same command tries them again",
        "1 of 3 samples have not been run yet; the same command continues",
    ]


def test_what_parts_are_judged_by_stays_with_the_merged_run(tmp_path: Path) -> None:
    runs = [part(tmp_path / f"{k}", row(f"{k}")) for k in range(2)]
    for i, run in enumerate(runs):  # the same, in another layout
        (run.folder / "thresholds.json").write_text(json.dumps({"threshold": 4.2, "fpr": 0.01}, indent=i))
    (runs[1].folder / "controls.json").write_text('{"prompts": []}')  # of a part that was done
    merged = Run.merge(tmp_path / "all", runs)
    assert json.loads((merged.folder / "thresholds.json").read_text()) == {"threshold": 4.2, "fpr": 0.01}
    assert (merged.folder / "controls.json").read_text() == '{"prompts": []}'


@pytest.mark.parametrize(
    ("name", "other", "says"),
    [
        ("thresholds.json", '{"threshold": 5}', "hold different thresholds.json (threshold: was 4, now 5)"),
        ("thresholds-five.json", '{"threshold": 5}', "hold different thresholds-five.json (threshold: was 4, now 5)"),
        ("controls.json", '{"threshold": 5}', "hold different controls.json (threshold: was 4, now 5)"),
        ("thresholds.json", "{", "hold different thresholds.json (one of them does not parse)"),
        ("thresholds.json", None, "is judged by thresholds.json and"),
    ],
)
def test_parts_that_are_judged_differently_do_not_merge(
    tmp_path: Path, name: str, other: str | None, says: str
) -> None:
    runs = [part(tmp_path / f"{k}", row(f"{k}")) for k in range(2)]
    for run, content in zip(runs, ('{"threshold": 4}', other), strict=True):
        if content is not None:
            (run.folder / name).write_text(content)
    with pytest.raises(RunError) as e:
        Run.merge(tmp_path / "all", runs)
    assert says in str(e.value)
    assert str(runs[1].folder) in str(e.value)
    assert not (tmp_path / "all").exists()


# What rows say about their prompts


def test_rows_take_over_what_is_known_now(run: Run) -> None:
    scores = {"magnitude": Score(value=0.1 + 0.2, space="eps", per_step=[1e-7, 1 / 3])}
    write(run, row("a", scores=scores, group="old", label=True), row("b", status="error", error="x"))
    write(run, row("c"), row("d"), shard=2)
    before = {r.id: r for r in run.rows()}
    facts = {
        "a": {"group": "planted", "label": None},
        "b": {"label": False},
        "c": {"prompt_id": "p-c", "group": None},
        "nowhere": {"label": True},
    }
    assert run.amend(facts) == 2
    after = {r.id: r for r in run.rows()}
    assert after["a"] == before["a"].model_copy(update=facts["a"])
    assert after["b"] == before["b"].model_copy(update=facts["b"])
    assert (after["c"], after["d"]) == (before["c"], before["d"])
    assert run.amend(facts) == 0


def test_only_files_that_change_are_touched_and_only_when_nobody_writes_them(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run, row("a"))
    write(run, row("b"), shard=1)
    with Writer(run, 1):
        assert run.amend({"a": {"label": True}}) == 1
        with pytest.raises(RunError, match="is being written by another process; wait for it to end"):
            run.amend({"b": {"label": True}})

    def killed(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            run.amend({"a": {"label": False}, "b": {"label": False}})
    assert {r.id: r.label for r in run.rows()} == {"a": True, "b": None}
    assert sorted(p.name for p in run.folder.iterdir() if not p.name.startswith(".lock")) == [
        "run.json",
        "samples-1.jsonl",
        "samples.jsonl",
    ]


def test_runs_of_other_settings_do_not_merge(tmp_path: Path) -> None:
    runs = [Run.open(tmp_path / f"{g}", Manifest(setting={"guidance": g})) for g in (7.5, 3.0)]
    with pytest.raises(RunError, match=r"different settings \(guidance: was 7.5, now 3.0\)"):
        Run.merge(tmp_path / "all", runs)
    with pytest.raises(RunError, match="no run to merge"):
        Run.merge(tmp_path / "all", [])
    assert not (tmp_path / "all").exists()


# Exports


@pytest.fixture
def full(run: Run) -> Run:
    nearest = Nearest(reference="#17", similarity=0.93, descriptor="pixels", threshold=0.9, copy_found=True)
    scores = {"magnitude": Score(value=1.5, space="eps", per_step=[1.0, 2.0])}
    rows = [
        row("a", prompt='quotes "here", and\na line break 🐈', label=True, scores=scores, nearest=nearest),
        row("b", status="error", error="ModelFault: NaN"),
    ]
    write(run, *rows)
    return run


def test_parquet_holds_everything(full: Run, tmp_path: Path) -> None:
    table = pq.read_table(full.to_parquet(tmp_path / "rows.parquet"))
    assert table.equals(full.to_table())
    first, second = table.to_pylist()
    assert first["prompt"] == 'quotes "here", and\na line break 🐈'
    assert (first["magnitude"], first["magnitude.space"], first["magnitude.per_step"]) == (1.5, "eps", [1.0, 2.0])
    assert (first["nearest.reference"], first["nearest.copy_found"], first["label"]) == ("#17", True, True)
    assert (second["status"], second["magnitude"], second["error"]) == ("error", None, "ModelFault: NaN")
    assert not list(tmp_path.glob(".rows*"))


def test_csv_holds_everything_but_lists(full: Run, tmp_path: Path) -> None:
    with full.to_csv(tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert first["prompt"] == 'quotes "here", and\na line break 🐈'
    assert (first["magnitude"], first["nearest.similarity"]) == ("1.5", "0.93")
    assert "magnitude.per_step" not in first
    assert second["error"] == "ModelFault: NaN"


def test_a_run_without_rows_can_be_exported(run: Run, tmp_path: Path) -> None:
    assert pq.read_table(run.to_parquet(tmp_path / "rows.parquet")).num_rows == 0
    assert run.to_csv(tmp_path / "rows.csv").read_text().count("\n") == 1


def test_many_rows_are_exported_in_parts(run: Run) -> None:
    write(run, *(row(str(i)) for i in range(2500)))
    assert run.to_table().column("id").to_pylist() == [str(i) for i in range(2500)]


def test_reading_needs_no_torch() -> None:
    code = "import sys, mnemoscope.records, mnemoscope.records.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_lock_that_cannot_be_made_is_one_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", ".lock")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    for use in (lambda: run.update(status="done"), Writer(run).__enter__, lambda: Run.open(run.folder, run.manifest)):
        with pytest.raises(
            RunError, match=r"cannot be written \(Permission denied\); choose a folder you may write to"
        ):
            use()


@pytest.mark.skipif(os.name != "posix", reason="files that are open stay where they are")
@pytest.mark.parametrize("how", ["deleted", "replaced", "emptied"])
def test_a_folder_that_is_deleted_ends_the_writing(run: Run, how: str) -> None:
    standing = OutFolder(run.folder)
    with Writer(run) as writer:
        writer.append([row("a")])
        standing.require("run.json", "samples.jsonl")
        if how == "emptied":
            for path in run.folder.iterdir():
                path.unlink()
        else:
            shutil.rmtree(run.folder)
        if how == "replaced":
            run.folder.mkdir()
            (run.folder / "samples.jsonl").touch()
        for use in (
            lambda: writer.append([row("b")]),
            lambda: writer.save("images/b.webp", b"b"),
            lambda: standing.require("run.json"),
        ):
            with pytest.raises(RunError, match="was deleted or emptied while this command wrote to it"):
                use()
    assert not (run.folder / "images").exists()
