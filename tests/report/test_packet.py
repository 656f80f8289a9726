"""Packets: the same run gives the same bytes, and whatever is changed in one is found."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forging import Change, few_resamples, member, of_json, of_row, rewrite  # noqa: F401 (a fixture)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from measured_folder import censored, reproduced
from measured_folder import write as write_measures
from synthetic_run import make_run

from mnemoscope import stats
from mnemoscope.errors import RunError, UsageError
from mnemoscope.records.files import folder_name
from mnemoscope.records.schema import Nearest, Row, Score
from mnemoscope.records.store import Run, Writer, sample_id
from mnemoscope.records.table import prompt_scores
from mnemoscope.report import archive as archives
from mnemoscope.report import packet as packets
from mnemoscope.report.archive import SUMS, Archive, parse_sums, plain, sha256_of, write_sums
from mnemoscope.report.html import write_json
from mnemoscope.report.packet import pack
from mnemoscope.report.verify import Verified, check_sums, sound_packet, verify

SETTING = {"world": 1}
"""What the ids of the synthetic run are hashes of."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "v2", per_group=3, seeds=2, labels=True, setting=SETTING)


@pytest.fixture(scope="module")
def packed(run: Path) -> Path:
    return pack([run]).path


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A run of one's own."""
    return Path(shutil.copytree(run, tmp_path / "own"))


@pytest.fixture
def edit(packed: Path, tmp_path: Path) -> Callable[..., Path]:
    """``edit(change)``: the packet with other contents; ``sums=True`` lists them as whoever forges it would."""

    def make(change: Change, *, sums: bool = False) -> Path:
        return rewrite(packed, tmp_path / "edited.zip", change, sums=sums)

    return make


# What is in it


@pytest.mark.skipif(
    os.name != "posix" or sys.platform == "darwin", reason="such names are names of files on Linux alone"
)
@pytest.mark.parametrize("name", [b"v\xff", b"a\\b", b"\xff" * 200])
def test_a_run_whose_name_not_every_system_can_have_is_packed_and_reported(
    name: bytes, run: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / os.fsdecode(name)))
    packed = pack([folder], images=False)
    assert verify(packed.path).sound
    said = json.loads(write_json(folder).read_bytes())
    assert said["run"] == folder_name(folder)


def test_a_packet_is_sound_and_says_its_digest(run: Path, packed: Path) -> None:
    found = verify(packed, expected=pack([run]).digest.upper())
    assert found.faults == []
    assert (found.sound, found.exit_code, found.status) == (True, 0, "incomplete")
    assert found.counts == {"ok": 35, "failed": 1, "prompts": 18, "asked": 36, "missing": 0}
    assert found.digest == pack([run]).digest
    assert len(found.checked) == 7


def test_it_holds_what_an_auditor_asks_for(run: Path, packed: Path) -> None:
    said = member(packed, "packet.json")
    manifest = json.loads((run / "run.json").read_bytes())
    for name in ("command", "config", "setting", "target", "versions", "git", "machine", "status"):
        assert said[name] == manifest[name]
    assert said["made_with"]["mnemoscope"]
    assert said["seeds"] == {"per_prompt": 2, "base_seed": None, "seed_mode": None, "seen": [0, 1]}
    assert said["threshold"]["source"] == "199 prompts from ordinary.jsonl"
    assert said["threshold"]["threshold"] == json.loads((run / "thresholds.json").read_bytes())["threshold"]
    assert any("Adversarial prompts" in sentence for sentence in said["not_tested"])
    assert "weights were loaded" in said["access"][0]
    assert said["parts"][0]["files"]["run.json"] == archives.sha256_file(run / "run.json")


def test_evidence_is_copied_byte_for_byte(run: Path, packed: Path) -> None:
    with zipfile.ZipFile(packed) as archive:
        for name in ("run.json", "samples.jsonl", "thresholds.json", "controls.json"):
            assert archive.read(name) == (run / name).read_bytes()
        pictures = [name for name in archive.namelist() if "/" in name]
        assert len(pictures) > 35
        assert all(archive.read(name) == (run / name).read_bytes() for name in pictures)


def test_splits_are_the_prompts_with_their_clusters(run: Path, packed: Path) -> None:
    prompts = member(packed, "splits.json")["prompts"]
    assert len(prompts) == 18
    known = [p for p in prompts if p["label"] is not None]
    assert sorted(p["cluster"] for p in known) == list(range(len(known)))
    assert all(p["cluster"] is None for p in prompts if p["label"] is None)
    assert [s for p in prompts for s in p["samples"]] == [row.id for row in Run(run).rows()]


def test_roc_has_arrays_and_intervals_of_detector_and_wording(packed: Path) -> None:
    roc = member(packed, "roc.json")
    names = [score["score"] for score in roc["scores"]]
    assert names == ["magnitude", "text only: character n-grams"]
    for score in roc["scores"]:
        assert score["auc"]["low"] <= score["auc"]["value"] <= score["auc"]["high"]
        assert len(score["roc"]["fpr"]) == len(score["roc"]["tpr"]) == len(score["roc"]["threshold"])
        assert score["roc"]["threshold"][0] is None  # nobody called: infinity
    assert roc["missing"] == {}


def test_without_labels_the_reason_stands_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "plain", per_group=2, seeds=1, pictures=False, calibrated=False, setting=SETTING)
    packet = pack([run]).path
    assert member(packet, "roc.json")["scores"] == []
    assert member(packet, "roc.json")["missing"]["magnitude"].startswith("No scored prompt has a known label")
    assert member(packet, "packet.json")["threshold"] is None
    assert verify(packet).sound


def test_the_report_is_of_the_same_rows_and_pictures(packed: Path) -> None:
    with zipfile.ZipFile(packed) as archive:
        page = archive.read("report.html").decode()
        rows = sha256_of([archive.read("samples.jsonl")])
    assert rows in page
    assert page.count("data:image/webp") > 6
    assert "image missing" not in page


def test_an_unpacked_packet_is_a_run_folder(packed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(tmp_path)
    assert len(list(Run(tmp_path).rows())) == 36


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
def test_it_can_be_checked_with_sha256sum_alone(run: Path, packed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(tmp_path)
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", SUMS], cwd=tmp_path, check=True)
    said = subprocess.run(["sha256sum", SUMS], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said.split()[0] == pack([run]).digest


# The same run, the same bytes


def test_packing_twice_gives_the_same_bytes(run: Path, packed: Path, tmp_path: Path) -> None:
    again = pack([run], tmp_path / "again.zip")
    assert again.path.read_bytes() == packed.read_bytes()


def test_shards_give_one_packet_in_whatever_order_they_are_named(run: Path, tmp_path: Path) -> None:
    parts = []
    for k in range(3):
        part = tmp_path / f"rc-{'cab'[k]}"
        shutil.copytree(run, part)
        lines = (part / "samples.jsonl").read_bytes().splitlines(keepends=True)
        (part / "samples.jsonl").unlink()
        (part / f"samples-{k}.jsonl").write_bytes(b"".join(lines[k::3]))
        manifest = Run(part).manifest
        Run(part).update(status="incomplete", config=manifest.config | {"shard": f"{k}/3"})
        parts.append(part)
    one, other = pack(parts, tmp_path / "one.zip"), pack(parts[::-1], tmp_path / "other.zip")
    assert one.path.read_bytes() == other.path.read_bytes()
    assert verify(one.path).sound
    assert one.counts == {"ok": 35, "failed": 1, "prompts": 18, "asked": 36, "missing": 0}
    assert [part["shard"] for part in member(one.path, "packet.json")["parts"]] == ["0/3", "1/3", "2/3"]
    with zipfile.ZipFile(one.path) as archive:
        assert sum(name.startswith("images/") for name in archive.namelist()) == 35


def test_folders_of_different_audits_are_refused(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", per_group=2, seeds=1, pictures=False, setting=SETTING)
    with pytest.raises(UsageError, match="no shards of one audit"):
        pack([run, other])
    assert not list(tmp_path.glob("*.zip"))


# Unfinished, torn, damaged


def test_a_run_that_goes_on_is_packed_and_says_so(copied: Path) -> None:
    Run(copied).update(status="running", asked=100)
    with (copied / "samples.jsonl").open("ab") as file:
        file.write(b'{"id": "half a li')
    done = pack([copied])
    assert (done.status, done.counts["missing"]) == ("running", 64)
    assert "The run is running: 36 of 100 samples are there." in done.notes
    found = verify(done.path)
    assert found.sound
    assert "the run is running" in found.notes[0]


def test_a_calibration_can_be_packed(copied: Path) -> None:
    Run(copied).update(kind="calibrate")
    scores = sorted(p.score for p in prompt_scores(Run(copied).rows(), "magnitude"))
    line = stats.threshold_at_fpr(scores, 0.1)
    thresholds = json.loads((copied / "thresholds.json").read_bytes())
    thresholds |= {"scores": scores, "fpr": 0.1, "threshold": line.value}
    thresholds["interval"] = [b if math.isfinite(b) else None for b in (line.interval.low, line.interval.high)]
    (copied / "thresholds.json").write_text(json.dumps(thresholds))
    found = verify(pack([copied]).path)
    assert found.faults == []
    assert any("are those of the rows" in checked for checked in found.checked)


def test_a_damaged_line_is_named_and_leaves_nothing(copied: Path) -> None:
    lines = (copied / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (copied / "samples.jsonl").write_bytes(b"".join([*lines[:3], b"nonsense\n", *lines[3:]]))
    with pytest.raises(RunError, match=r"line 4 of .*samples\.jsonl is damaged"):
        pack([copied])
    assert [p.name for p in copied.parent.iterdir()] == ["own"]


def test_a_full_disk_is_said_and_leaves_nothing(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packets, "add", full)
    with pytest.raises(RunError, match="is full"):
        pack([copied])
    assert [p.name for p in copied.parent.iterdir()] == ["own"]


def test_interrupting_leaves_nothing(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packets, "derive", stop)
    with pytest.raises(KeyboardInterrupt):
        pack([copied])
    assert [p.name for p in copied.parent.iterdir()] == ["own"]


def test_a_kill_leaves_no_packet(copied: Path, tmp_path: Path) -> None:
    code = f"""
import time
from mnemoscope.report import packet
packet.derive = lambda *_: time.sleep(60)
packet.pack([{str(copied)!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".own.packet.zip.*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(".own.packet.zip.*")) != []
    assert list(tmp_path.glob("*.zip")) == []
    assert verify(pack([copied]).path).sound


def test_another_packet_is_not_overwritten(copied: Path) -> None:
    first = pack([copied])
    before = first.path.read_bytes()
    assert pack([copied]).digest == first.digest
    Run(copied).update(notes=["something else"])
    with pytest.raises(UsageError, match="name another file with --out"):
        pack([copied])
    assert first.path.read_bytes() == before


# Pictures


def test_without_pictures_their_sums_are_kept(run: Path, tmp_path: Path) -> None:
    packet = pack([run], tmp_path / "bare.zip", images=False).path
    with zipfile.ZipFile(packet) as archive:
        assert not any("/" in name for name in archive.namelist())
        assert b"data:image" not in archive.read("report.html")
    left = member(packet, "packet.json")["pictures"]["left_out"]
    assert len(left) > 35
    assert all(archives.sha256_file(run / name) == sum for name, sum in left.items())
    assert verify(packet).sound


def add_rows(folder: Path, names: list[str], seeds: int = 2) -> None:
    """A prompt for each name; its first seed names a picture."""
    near = Nearest(reference="1", similarity=0.5, descriptor="pixels", threshold=0.9, copy_found=False)
    with Writer(Run(folder)) as writer:
        for i, name in enumerate(names):
            writer.append([
                Row(
                    id=sample_id(f"extra {i}", seed, SETTING),
                    prompt_id=f"x{i}",
                    prompt=f"extra {i}",
                    seed=seed,
                    status="ok",
                    scores={"magnitude": Score(value=1.0, space="eps", per_step=[1.0])},
                    image=name if seed == 0 else None,
                    nearest=near.model_copy(update={"file": name}),
                )
                for seed in range(seeds)
            ])  # fmt: skip
    Run(folder).update(asked=Run(folder).manifest.asked + len(names) * seeds)


def test_only_pictures_inside_the_run_are_packed(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (copied / "images" / "link.webp").symlink_to(tmp_path / "secret.txt")
    names = [
        "../secret.txt",
        "run.json",
        "images/link.webp",
        "images/../../secret.txt",
        str(tmp_path / "secret.txt"),
        "images\\x",
    ]
    add_rows(copied, names)
    packet = pack([copied]).path
    assert set(member(packet, "packet.json")["pictures"]["missing"]) == set(names)
    with zipfile.ZipFile(packet) as archive:
        assert not any(archive.read(name) == b"secret" for name in archive.namelist())
        assert archive.namelist().count("run.json") == 1
    assert verify(packet).sound


@pytest.mark.parametrize("name", ["thresholds-more.json", "measures"])
def test_what_leads_out_of_the_run_is_not_packed(copied: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "private").mkdir()
    write_measures(tmp_path / "private", {"aa": {"result": censored(0.2)}})
    (copied / name).symlink_to(tmp_path / "private" / ("" if name == "measures" else "measure.json"))
    with pytest.raises(RunError, match=name):
        pack([copied])
    assert not list(tmp_path.rglob("*.packet.zip"))


# Changes


def test_every_changed_byte_of_every_file_is_found(packed: Path, edit: Callable[..., Path]) -> None:
    noted = verify(packed).digest
    with zipfile.ZipFile(packed) as archive:
        sizes = {name: len(archive.read(name)) for name in archive.namelist()}
    for name in [name for name in sizes if "/" not in name] + [name for name in sizes if "/" in name][:3]:
        for place in (0, sizes[name] // 2, sizes[name] - 1):

            def flip(contents: dict[str, bytes], name: str = name, place: int = place) -> None:
                data = bytearray(contents[name])
                data[place] ^= 1
                contents[name] = bytes(data)

            found = Verified(packed)
            with Archive(edit(flip)) as archive:
                check_sums(archive, found, noted)
            assert any(name in fault or "another packet" in fault for fault in found.faults), (name, place)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_of_the_archive_is_found_or_means_nothing(
    packed: Path, tmp_path: Path, data: st.DataObject
) -> None:
    raw = bytearray(packed.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    broken = tmp_path / "broken.zip"
    broken.write_bytes(raw)
    try:
        with Archive(broken) as archive:
            read = {name: archive.read(name) for name in archive.names}
    except RunError:
        return
    with zipfile.ZipFile(packed) as whole:
        unharmed = {name: whole.read(name) for name in whole.namelist()}
    if read != unharmed:  # a name, say
        assert not verify(broken).sound


def rename(contents: dict[str, bytes]) -> None:
    contents["thresholds-old.json"] = contents.pop("thresholds.json")


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        (lambda c: c.pop("controls.json"), ["controls.json is listed and missing"]),
        (lambda c: c.update({"more.txt": b"more"}), ["more.txt is there and not listed"]),
        (rename, ["thresholds.json is listed and missing", "thresholds-old.json is there and not listed"]),
        (lambda c: c.pop(SUMS), [f"holds no {SUMS}"]),
        (lambda c: c.update({SUMS: b"nonsense\n" + c[SUMS]}), [f"line 1 of {SUMS} is damaged"]),
        (lambda c: c.update({SUMS: c[SUMS] + c[SUMS]}), [f"of {SUMS} is damaged"]),
        (lambda c: c.update({"../out.txt": b"x"}), ["'../out.txt' leads out of a folder"]),
        (lambda c: c.update({"/etc/out.txt": b"x"}), ["'/etc/out.txt' leads out"]),
        (lambda c: c.update({"images/C:out.txt": b"x"}), ["leads out"]),
        (lambda c: c.update({"RUN.json": b"x"}), ["is there twice"]),
        (lambda c: c.update({"packet.json": b"[]"}), ["packet.json was changed", "packet.json holds list"]),
        (lambda c: c.update({"packet.json": b"[" * 100_000}), ["packet.json is damaged"]),
        (lambda c: c.update({"samples.jsonl": c["samples.jsonl"] + b"{"}), ["line 37 of samples.jsonl is damaged"]),
    ],
)  # fmt: skip
def test_what_is_missing_added_or_renamed_is_named(
    edit: Callable[..., Path], tmp_path: Path, change: Change, faults: list[str]
) -> None:
    before = sorted(tmp_path.parent.iterdir())
    found = verify(edit(change))
    assert found.exit_code == 1
    for fault in faults:
        assert any(fault in said for said in found.faults), found.faults
    assert sorted(tmp_path.parent.iterdir()) == before  # nothing was unpacked
    with pytest.raises(UsageError, match="is not sound"):
        sound_packet(tmp_path / "edited.zip")


def test_a_file_that_is_there_twice_is_found(packed: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice.zip"
    shutil.copy(packed, twice)
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("run.json", "{}")
    assert any("run.json is there twice" in fault for fault in verify(twice).faults)


def test_folders_that_other_programs_list_do_no_harm(packed: Path, tmp_path: Path) -> None:
    listed = tmp_path / "listed.zip"
    shutil.copy(packed, listed)
    with zipfile.ZipFile(listed, "a") as archive:
        archive.mkdir("images") if sys.version_info >= (3, 11) else archive.writestr("images/", b"")
    assert verify(listed).sound


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_archive_cannot_be_read(packed: Path, tmp_path: Path, share: float) -> None:
    cut = tmp_path / "cut.zip"
    cut.write_bytes(packed.read_bytes()[: int(share * packed.stat().st_size)])
    with pytest.raises(RunError, match="no whole zip archive"):
        verify(cut)


def test_what_is_no_packet_is_said(tmp_path: Path, run: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("cat.jpg", b"x")
    with pytest.raises(RunError, match="is no packet"):
        verify(tmp_path / "photos.zip")
    with pytest.raises(RunError, match="does not exist"):
        verify(tmp_path / "nowhere.zip")
    with pytest.raises(RunError, match="no whole zip archive"):
        verify(run)


def test_bombs_are_not_unpacked(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "ALWAYS", 1 << 20)
    bomb = rewrite(packed, tmp_path / "bomb.zip", lambda c: c.update({"samples.jsonl": bytes(1 << 26)}))
    with pytest.raises(RunError, match="it is not unpacked"):
        verify(bomb)
    monkeypatch.setattr(archives, "LONGEST", 1 << 12)
    endless = rewrite(packed, tmp_path / "line.zip", lambda c: c.update({"samples.jsonl": b"x" * (1 << 16)}))
    assert any("has a line of more than" in fault for fault in verify(endless).faults)


# Changes by somebody who changes the sums as well


def score(value: float) -> Callable[[dict[str, Any]], None]:
    return lambda row: row["scores"]["magnitude"].update(value=value)


def edited_auc(roc: dict[str, Any]) -> None:
    roc["scores"][0]["auc"]["value"] = 0.25


def edited_bound(roc: dict[str, Any]) -> None:
    roc["scores"][0]["auc"]["low"] = 0.25


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (of_row(0, score(99.0)), "roc.json: scores.0"),
        (of_row(35, lambda row: row.update(status="ok", error=None)), "packet.json: counts.ok is 35, and 36 follows"),
        (of_row(0, lambda row: row.update(prompt="another prompt")), "1 of 36 rows are not what their prompts, seeds and setting"),
        (of_row(0, lambda row: row.update(seed=7)), "1 of 36 rows are not what their prompts"),
        (of_row(1, lambda row: row.update(id="0" * 20)), "1 of 36 rows are not what their prompts"),
        (of_row(0, lambda row: row["nearest"].update(copy_found=not row["nearest"]["copy_found"])), "against their own similarity"),
        (of_row(0, lambda row: row.update(label=None)), "splits.json: prompts.0.label is true, and null follows"),
        (of_row(0, lambda row: row.update(image="images/other.webp")), "1 pictures that rows name are neither there"),
        (of_json("thresholds.json", lambda t: t.update(threshold=9.0)), "thresholds.json: threshold is 9.0, and"),
        (of_json("thresholds.json", lambda t: t.update(fpr=0.05)), "thresholds.json: threshold is"),
        (of_json("run.json", lambda m: m.update(command="rm")), "packet.json: command is"),
        (of_json("run.json", lambda m: m["setting"].update(world=2)), "36 of 36 rows are not what"),
        (of_json("roc.json", edited_auc), "roc.json: scores.0.auc.value is 0.25, and"),
        (of_json("roc.json", edited_bound), "roc.json: scores.0.auc.low is 0.25, and"),
        (of_json("roc.json", lambda roc: roc["scores"].pop()), "roc.json: scores.1"),
        (of_json("controls.json", lambda c: c["ngrams"]["auc"].update(value=0.9)), "text-only baseline contradicts its own scores"),
        (of_json("splits.json", lambda s: s["prompts"].pop()), "splits.json: prompts.17"),
        (of_json("packet.json", lambda p: p["not_tested"].pop(0)), "packet.json: not_tested.0"),
        (of_json("packet.json", lambda p: p.update(status="perfect")), 'packet.json: status is "perfect", and "incomplete" follows'),
        (of_json("packet.json", lambda p: p.update(praise="very good")), 'packet.json: praise is "very good", and nothing follows'),
        (of_json("packet.json", lambda p: p.update(format=2)), "packet.json has format 2"),
        (of_json("packet.json", lambda p: p.pop("parts")), "packet.json has no parts"),
    ],
)  # fmt: skip
def test_numbers_that_do_not_follow_from_the_rows_are_found(
    edit: Callable[..., Path], change: Change, fault: str
) -> None:
    found = verify(edit(change, sums=True))
    assert any(fault in said for said in found.faults), found.faults
    assert not any("was changed" in said for said in found.faults)


def test_a_forged_packet_has_another_digest(packed: Path, edit: Callable[..., Path]) -> None:
    noted = verify(packed).digest
    forged = edit(lambda c: c.update({"README.txt": b"Trust me."}), sums=True)
    assert verify(forged).faults == ["README.txt is not what follows from the records"]
    assert "this is another packet" in verify(forged, expected=noted).faults[0]


def test_other_versions_are_not_accused_of_wording_and_draws(packed: Path, edit: Callable[..., Path]) -> None:
    low = member(packed, "roc.json")["scores"][0]["auc"]["low"]

    def older(contents: dict[str, bytes]) -> None:
        of_json("packet.json", lambda p: p["made_with"].update(numpy="1.26.0"))(contents)
        of_json("packet.json", lambda p: p.update(headline=p["headline"].replace("prompts", "texts")))(contents)
        of_json("roc.json", lambda roc: roc["scores"][0]["auc"].update(low=low + 1e-8))(contents)

    found = verify(edit(older, sums=True))
    assert found.sound
    assert any("numpy 1.26.0" in note for note in found.notes)

    def older_and_wrong(contents: dict[str, bytes]) -> None:
        older(contents)
        of_json("roc.json", edited_auc)(contents)

    assert any("scores.0.auc.value" in fault for fault in verify(edit(older_and_wrong, sums=True)).faults)


JUNK = st.sampled_from([None, True, -1, 1e300, 10**400, "", "x", [], {}, [[]], {"auc": 1}])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_packet_holds_it_is_judged_and_nothing_breaks(
    packed: Path, tmp_path: Path, data: st.DataObject
) -> None:
    name = data.draw(
        st.sampled_from(["run.json", "thresholds.json", "controls.json", "packet.json", "splits.json", "roc.json"])
    )

    def spoil(contents: dict[str, bytes]) -> None:
        value = json.loads(contents[name])
        holder = value
        while True:
            key = (
                data.draw(st.sampled_from(sorted(holder)))
                if isinstance(holder, dict)
                else data.draw(st.integers(0, len(holder) - 1))
            )
            inner = holder[key]
            if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
                holder[key] = data.draw(JUNK)
                break
            holder = inner
        contents[name] = json.dumps(value).encode()

    found = verify(rewrite(packed, tmp_path / "spoiled.zip", spoil, sums=True))
    json.dumps(found.to_dict(), allow_nan=False)


# Measured pictures


def add_measures(run: Path) -> Path:
    rate = stats.clopper_pearson(31, 32)
    least = stats.replication_bound(7.68, rate.low)
    stored = reproduced(0.01, rate=[rate.value, rate.low, rate.high], at_least=least)
    folder = write_measures(run / "measures", {"aa": {"result": stored}, "bb": {"result": censored(0.2)}})
    (folder / "pictures/aa.safetensors").write_bytes(b"noise")
    return folder


@pytest.fixture
def measured(copied: Path) -> Path:
    add_measures(copied)
    return copied


def test_pictures_that_were_measured_are_in_the_packet(measured: Path) -> None:
    packed = pack([measured]).path
    found = verify(packed)
    assert found.faults == []
    assert any("2 measured pictures" in checked for checked in found.checked)
    assert member(packed, "packet.json")["measured"] | {"model": ""} == {
        "model": "", "preset": {"name": "improved", "updates": 300, "steps": 16, "scales": [1.0, 3.0], "draws": 8},
        "descriptor": {"descriptor": "fingerprint"}, "beta": 0.85, "reproduced": 1, "censored": 1, "screened out": 0, "waiting": 0,
        "scores": {"aa": 0.01, "bb": None},
    }  # fmt: skip
    with zipfile.ZipFile(packed) as archive:
        names = set(archive.namelist())
        assert b"0.0100" in archive.read("report.html")
        assert b"bb.png" in archive.read("measures/report.html")
        assert archive.read("measures/pictures/aa.json") == (measured / "measures/pictures/aa.json").read_bytes()
    assert {"measures/measure.json", "measures/pictures/bb-target.webp", "measures/pictures/aa-draw-3.webp"} <= names
    assert "measures/pictures/aa.safetensors" in names


def test_without_images_sums_of_measured_pictures_and_their_noises_are_kept(measured: Path) -> None:
    packed = pack([measured], images=False).path
    assert verify(packed).faults == []
    left_out = member(packed, "packet.json")["pictures"]["left_out"]
    target = measured / "measures/pictures/aa-target.webp"
    assert left_out["measures/pictures/aa-target.webp"] == sha256_of([target.read_bytes()])
    assert "measures/pictures/aa.safetensors" in left_out
    with zipfile.ZipFile(packed) as archive:
        measures = {name for name in archive.namelist() if name.startswith("measures/")}
    assert measures == {
        f"measures/{name}" for name in ("measure.json", "report.html", "pictures/aa.json", "pictures/bb.json")
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda result: result.update(succeeded=[16, 32]),
        lambda result: result.update(rate=[0.5, 0.4, 0.6]),
        lambda result: result.update(rate=None),
        lambda result: result.update(passed=False),
        lambda result: result.update(at_least=5.0),
        lambda result: result.update(at_least=None),
        lambda result: result.update(nats=0.1),
        lambda result: result.update(succeeded=[33, 32]),
    ],
)
def test_results_that_were_changed_are_found(
    measured: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    forged = of_json("measures/pictures/aa.json", lambda entry: change(entry["result"]))
    found = verify(rewrite(pack([measured]).path, tmp_path / "forged.zip", forged, sums=True))
    assert any("does not follow from their own draws (aa)" in fault or "aa.json is" in fault for fault in found.faults)


def test_a_score_that_was_changed_is_found(measured: Path, tmp_path: Path) -> None:
    forged = of_json("measures/pictures/aa.json", lambda entry: entry["result"].update(score=0.5))
    found = verify(rewrite(pack([measured]).path, tmp_path / "forged.zip", forged, sums=True))
    assert any("measured.scores.aa" in fault for fault in found.faults)


def test_levels_outside_of_the_folder_cannot_be_packed(measured: Path, tmp_path: Path) -> None:
    file = measured / "measures/measure.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"levels": "../levels.json"}))
    with pytest.raises(RunError, match="outside of its folder"):
        pack([measured], tmp_path / "p.zip")


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("measures/measure.json", lambda said: said.update(levels="/dev/zero"), "not in the packet"),
        ("measures/measure.json", lambda said: said.update(levels="../run.json"), "not in the packet"),
        ("measures/measure.json", lambda said: said["preset"].update(scales=["x"]), "measure.json is damaged"),
        ("measures/measure.json", lambda said: said["preset"].update(scales=5), "measure.json is damaged"),
        ("measures/measure.json", lambda said: said.update(format=99), "update mnemoscope"),
        ("measures/pictures/aa.json", lambda entry: entry.update(id="bb"), "the result of another picture"),
    ],
)
def test_measures_that_would_lead_astray_are_faults(
    measured: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], None], fault: str
) -> None:
    found = verify(rewrite(pack([measured]).path, tmp_path / "forged.zip", of_json(name, change), sums=True))
    assert any(fault in said for said in found.faults)


def test_one_shard_of_two_may_hold_what_was_measured(run: Path, tmp_path: Path) -> None:
    parts = [Path(shutil.copytree(run, tmp_path / f"part{i}")) for i in (1, 2)]
    add_measures(parts[1])
    packed = pack(parts, tmp_path / "p.zip").path
    assert verify(packed).faults == []
    assert member(packed, "packet.json")["measured"]["reproduced"] == 1
    assert not any("measured" in note.lower() for note in member(packed, "run.json")["notes"])


def test_two_folders_of_measured_pictures_are_not_mixed(measured: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(measured, tmp_path / "other"))
    with pytest.raises(UsageError, match="both hold measured pictures"):
        pack([measured, other], tmp_path / "p.zip")


def test_a_merged_run_keeps_what_was_measured(run: Path, measured: Path, tmp_path: Path) -> None:
    merged = Run.merge(tmp_path / "merged", [Run(run), Run(measured)])
    assert (merged.folder / "measures/pictures/aa-target.webp").is_file()
    assert not any("Measured" in note for note in merged.manifest.notes)
    both = Run.merge(tmp_path / "both", [Run(measured), Run(merged.folder)])
    assert not (both.folder / "measures").exists()
    assert any("they were left where they are" in note and "/" not in note for note in both.manifest.notes)


# Names and sums


@pytest.mark.parametrize("name", ["run.json", "images/ab.webp", "thresholds-größe 2.json", "a/b/c"])
def test_plain_names(name: str) -> None:
    assert plain(name)


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "..", "a/../b", ".", "a\\b", "C:a", "a\nb", "a\x00", "a*", "\u202ea", "x" * 256]
)
def test_names_that_are_not(name: str) -> None:
    assert not plain(name)


def test_sums_are_read_as_they_are_written() -> None:
    sums = {"b": sha256_of([b"1"]), "a/ü x": sha256_of([b"2"])}
    assert parse_sums(write_sums(sums)) == sums


def test_packing_and_verifying_need_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "plain", per_group=2, seeds=1, setting=SETTING)
    code = f"""
import sys
import mnemoscope.cli.packet, mnemoscope.cli.replay
from mnemoscope.report.packet import pack
from mnemoscope.report.verify import verify
assert verify(pack([{str(run)!r}], {str(tmp_path / "p.zip")!r}).path).sound
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
