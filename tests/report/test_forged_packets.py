"""An able forger computes every sum and every number anew; what still contradicts the packet itself is found."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forging import Change, few_resamples, forge, make_stated_run, member, nothing, of_json, of_row, rewrite  # noqa: F401 (a fixture)
from measured_folder import reproduced
from measured_folder import write as write_measures
from PIL import Image

from mnemoscope import stats
from mnemoscope.errors import RunError, UsageError
from mnemoscope.records.store import Run, sample_id
from mnemoscope.report import archive as archives
from mnemoscope.report.archive import Archive, plain, same_name
from mnemoscope.report.comparison import bounds_apart, same_page
from mnemoscope.report.packet import READ_ME, pack
from mnemoscope.report.verify import sound_packet, verify

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stated_run(tmp_path_factory.mktemp("runs") / "v2")


@pytest.fixture(scope="module")
def packed(run: Path) -> Path:
    return pack([run]).path


def faults_of(path: Path) -> list[str]:
    result = verify(path)
    assert result.exit_code == (1 if result.faults else 3 if result.doubts else 0)
    return result.faults


def test_an_honest_packet_is_sound_and_says_what_was_compared(packed: Path) -> None:
    result = verify(packed)
    assert (result.faults, result.doubts, result.exit_code) == ([], [], 0)
    checked = " ".join(result.checked)
    for words in (
        "model, setting and configuration agree",
        "scores from their steps",
        "sums of the folder",
        "report.html: made once",
    ):
        assert words in checked
    assert any("controls.json" in sentence for sentence in result.unchecked)
    assert any("mnemoscope replay" in sentence for sentence in result.unchecked)


def test_a_forger_who_changes_nothing_makes_a_sound_packet(packed: Path, tmp_path: Path) -> None:
    assert faults_of(forge(packed, tmp_path / "forged.zip", nothing)) == []


# Records that contradict each other


def all_rows(change: Edit) -> Change:
    def apply(contents: dict[str, bytes]) -> None:
        rows = [json.loads(line) for line in contents["samples.jsonl"].splitlines()]
        kept = [row for row in rows if change(row) is not False]
        contents["samples.jsonl"] = b"".join(json.dumps(row).encode() + b"\n" for row in kept)

    return apply


def of_manifest(change: Edit) -> Change:
    return of_json("run.json", change)


def both(*changes: Change) -> Change:
    def apply(contents: dict[str, bytes]) -> None:
        for change in changes:
            change(contents)

    return apply


def of_setting(change: Edit) -> Change:
    """Another setting, with the ids that follow from it; pictures keep the names of their rows."""

    def apply(contents: dict[str, bytes]) -> None:
        manifest = json.loads(contents["run.json"])
        change(manifest["setting"])
        contents["run.json"] = json.dumps(manifest).encode()
        names: dict[str, str] = {}

        def rename(row: dict[str, Any]) -> None:
            row["id"] = sample_id(row["prompt"], row["seed"], manifest["setting"])
            if "image" in row:
                names[row["image"]] = row["image"] = f"images/{row['id']}.webp"

        old = [json.loads(line).get("image") for line in contents["samples.jsonl"].splitlines()]
        all_rows(rename)(contents)
        new = [json.loads(line).get("image") for line in contents["samples.jsonl"].splitlines()]
        move_pictures(contents, dict(zip(filter(None, old), filter(None, new), strict=True)))

    return apply


def move_pictures(contents: dict[str, bytes], names: dict[str, str]) -> None:
    statement = json.loads(contents["packet.json"])
    sums = statement["pictures"]["sha256"]
    for old, new in names.items():
        contents[new] = contents.pop(old)
        sums[new] = sums.pop(old)
    contents["packet.json"] = json.dumps(statement).encode()


def drop_pictures(contents: dict[str, bytes], kept: set[str]) -> None:
    for name in [name for name in contents if "/" in name and name not in kept]:
        del contents[name]


def without_some_rows(contents: dict[str, bytes]) -> None:
    lines = contents["samples.jsonl"].splitlines(keepends=True)
    contents["samples.jsonl"] = b"".join(lines[4:])
    rows = [json.loads(line) for line in lines[4:]]
    kept = {row.get("image") for row in rows} | {row["nearest"]["file"] for row in rows if "nearest" in row}
    drop_pictures(contents, kept)


def near(**changes: Any) -> Edit:
    return lambda row: row["nearest"].update(changes) if "nearest" in row else None


def uncopied(row: dict[str, Any]) -> None:
    if "nearest" in row:
        row["nearest"].update(threshold=0.99, copy_found=row["nearest"]["similarity"] > 0.99)


def scored(value: float) -> Edit:
    return lambda row: row["scores"]["magnitude"].update(value=value)


def doubled(row: dict[str, Any]) -> None:
    for score in row.get("scores", {}).values():
        score["value"] *= 2


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        pytest.param(without_some_rows, "the run is called done, and 20 of 24 samples are there", id="rows missing under done"),
        pytest.param(of_manifest(lambda m: m.update(asked=20)), "more than were asked for", id="more rows than asked for"),
        pytest.param(of_manifest(lambda m: m.update(asked=30)), "24 of 30 samples are there", id="fewer rows than asked for"),
        pytest.param(both(without_some_rows, of_manifest(lambda m: m.update(asked=20))), None, id="fewer prompts"),
        pytest.param(of_manifest(lambda m: m["config"].update(seeds=3)), "12 prompts with 3 seeds make 36", id="prompts times seeds"),
        pytest.param(of_manifest(lambda m: m["config"].update(seeds=1)), "of seeds that run.json does not", id="seeds not asked for"),
        pytest.param(of_row(0, scored(0.1)), "scored otherwise than as the mean of their own steps", id="a value that is no mean"),
        pytest.param(all_rows(doubled), "24 of 24 rows are scored otherwise", id="all values doubled"),
        pytest.param(of_row(0, lambda row: row["scores"]["magnitude"].update(per_step=[])), "scored otherwise", id="no steps"),
        pytest.param(of_row(0, lambda row: row["scores"].update(other=row["scores"]["magnitude"])), "does not name", id="unknown score"),
        pytest.param(of_row(0, lambda row: row.update(scores={})), "without a score that the setting names", id="no score"),
        pytest.param(of_row(0, lambda row: row.update(status="error")), "called failed, and hold a score", id="a failure"),
        pytest.param(of_row(0, near(similarity=1.5, copy_found=True)), "as similar as no two pictures are", id="similarity above 1"),
        pytest.param(of_row(0, near(similarity=-7.0, copy_found=False)), "as similar as no two pictures are", id="similarity below -1"),
        pytest.param(of_row(0, near(reconstruction=1.01)), "as similar as no two pictures are", id="reconstruction above 1"),
        pytest.param(of_row(0, near(layout=-3.0)), "as similar as no two pictures are", id="layout below -1"),
        pytest.param(all_rows(uncopied), "24 of 24 rows are compared by another descriptor or threshold", id="thresholds of all rows"),
        pytest.param(of_row(3, uncopied), "rows of one run were judged by different", id="threshold of one row"),
        pytest.param(of_row(0, near(descriptor="other")), "by another descriptor", id="another descriptor"),
        pytest.param(of_manifest(lambda m: m["config"].update(reference=None)), "by another descriptor", id="no reference set"),
        pytest.param(of_manifest(lambda m: m["config"]["reference"].update(threshold=7.0)), "by another", id="threshold of run.json"),
        pytest.param(of_manifest(lambda m: m["target"].update(dtype="float16")), "target and setting name different models", id="target"),
        pytest.param(of_setting(lambda s: s["target"].update(weights={})), "target and setting name different models", id="setting"),
        pytest.param(of_manifest(lambda m: m["config"].update(steps=50)), "steps is 50 in config, and 20 in setting", id="config"),
        pytest.param(of_setting(lambda s: s.update(guidance=7.5)), "guidance is 3.0 in config, and 7.5 in setting", id="guidance"),
        pytest.param(
            of_json("thresholds.json", lambda t: t["setting"].update(guidance=7.5)), "made under another setting", id="thresholds"
        ),
        pytest.param(of_json("thresholds.json", lambda t: t["setting"].update(seeds=1)), "(seeds: was 1, now 2)", id="thresholds' seeds"),
    ],
)  # fmt: skip
def test_records_that_contradict_each_other(packed: Path, tmp_path: Path, change: Change, fault: str | None) -> None:
    faults = faults_of(forge(packed, tmp_path / "forged.zip", change))
    if fault is None:
        assert faults == []
        return
    assert any(fault in said for said in faults), faults
    with pytest.raises(UsageError, match="is not sound"):  # replay
        sound_packet(tmp_path / "forged.zip")


def test_thresholds_of_another_setting_that_were_accepted_are_sound(packed: Path, tmp_path: Path) -> None:
    change = both(
        of_json("thresholds.json", lambda t: t["setting"].update(guidance=7.5)),
        of_manifest(lambda m: m.update(accepted=["guidance: was 7.5, now 3.0"])),
    )
    assert faults_of(forge(packed, tmp_path / "forged.zip", change)) == []


def test_scores_of_a_calibration_are_those_of_its_rows(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "ordinary"))
    manifest = json.loads((folder / "run.json").read_bytes())
    (folder / "run.json").write_text(json.dumps(manifest | {"kind": "calibrate"}))
    assert any(
        "it has 199 scores of ordinary prompts, and the rows give 12" in f for f in faults_of(pack([folder]).path)
    )


def test_a_score_of_generations_compares_all_that_are_there(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "density"))
    manifest = json.loads((folder / "run.json").read_bytes())
    manifest["setting"]["detectors"]["density"] = {"name": "density", "class": "DensityDetector", "options": {}}
    (folder / "run.json").write_text(json.dumps(manifest))
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_bytes().splitlines()]
    for row in rows:
        row["id"] = sample_id(row["prompt"], row["seed"], manifest["setting"])
        row.pop("image", None)
        if row["status"] == "ok":
            row["scores"]["density"] = {"value": 0.5, "space": "pixels", "generations": 4}
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert any("another number of generations" in fault for fault in faults_of(pack([folder]).path))


# What follows, and what only the packet says


def replace(name: str, data: bytes | Callable[[bytes], bytes]) -> Change:
    def apply(contents: dict[str, bytes]) -> None:
        contents[name] = data if isinstance(data, bytes) else data(contents[name])

    return apply


def of_statement(change: Edit) -> Change:
    return of_json("packet.json", change)


def of_part(change: Edit) -> Change:
    return of_statement(lambda statement: change(statement["parts"][0]))


def of_pictures(change: Edit) -> Change:
    return of_statement(lambda statement: change(statement["pictures"]))


def generated(contents: dict[str, bytes]) -> list[str]:
    return sorted(name for name in contents if name.startswith("images/"))


def swap_pictures(contents: dict[str, bytes]) -> None:
    one, other = generated(contents)[:2]
    contents[one], contents[other] = contents[other], contents[one]


def swap_names(contents: dict[str, bytes]) -> None:
    lines = contents["samples.jsonl"].splitlines()
    first, second = json.loads(lines[0]), json.loads(lines[1])
    first["image"], second["image"] = second["image"], first["image"]
    contents["samples.jsonl"] = b"\n".join([json.dumps(first).encode(), json.dumps(second).encode(), *lines[2:], b""])


def name_one_reference_for_another(contents: dict[str, bytes]) -> None:
    rows = [json.loads(line) for line in contents["samples.jsonl"].splitlines()]
    twice = [row["nearest"]["reference"] for row in rows if "nearest" in row]
    again = next(k for k, name in enumerate(twice) if name in twice[:k])
    other = next(row["nearest"]["file"] for row in rows if row["nearest"]["reference"] != twice[again])
    of_row(again, near(file=other))(contents)


def show_a_generated_picture(contents: dict[str, bytes]) -> None:
    second = json.loads(contents["samples.jsonl"].splitlines()[1])
    of_row(0, near(reference="another", file=second["image"]))(contents)


def without_a_picture(contents: dict[str, bytes]) -> None:
    del contents[generated(contents)[0]]


def with_another(kind: str, data: bytes) -> Change:
    def apply(contents: dict[str, bytes]) -> None:
        contents[next(name for name in contents if name.startswith(kind))] = data

    return apply


def gray_picture() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (64, 64), "gray").save(data, "WEBP")
    return data.getvalue()


@pytest.mark.parametrize(
    ("change", "afterwards", "fault"),
    [
        pytest.param(nothing, replace("report.html", b"<h1>Nothing was memorized.</h1>"), "report.html is not what follows", id="a report"),
        pytest.param(
            nothing, replace("report.html", lambda page: page.replace(b"Above threshold", b"Below")), "report.html is", id="a word"
        ),
        pytest.param(
            nothing, replace("report.html", lambda page: re.sub(rb"data:image/webp;base64,[^\"]+", b"", page, count=1)),
            "report.html is not", id="a picture of the report",
        ),
        pytest.param(nothing, replace("README.txt", b"Trust me."), "README.txt is not what follows", id="README"),
        pytest.param(nothing, lambda c: c.pop("report.html"), "it holds no report.html", id="no report"),
        pytest.param(nothing, lambda c: c.pop("README.txt"), "it holds no README.txt", id="no README"),
        pytest.param(nothing, of_part(lambda part: part["files"].update({"run.json": "0" * 64})), "another sum of run", id="run.json"),
        pytest.param(
            nothing, of_part(lambda part: part["files"].update({"samples.jsonl": "0" * 64})), "holds other rows", id="sum of the rows"
        ),
        pytest.param(
            nothing, of_part(lambda part: part["files"].update({"thresholds.json": "0" * 64})), "another sum of thresh", id="thresholds"
        ),
        pytest.param(nothing, of_part(lambda part: part["files"].pop("thresholds.json")), "another sum of thresholds", id="no sum"),
        pytest.param(
            nothing, of_part(lambda part: part["files"].update({"thresholds-x.json": "0" * 64})), "does not hold it", id="a file not packed"
        ),
        pytest.param(nothing, of_part(lambda part: part.update(status="incomplete")), "parts.0.status is another", id="status of a part"),
        pytest.param(nothing, of_part(lambda part: part.update(machine={})), "parts.0.machine is another", id="machine of a part"),
        pytest.param(nothing, of_statement(lambda s: s.update(parts=[])), "names no folder", id="no part"),
        pytest.param(nothing, of_part(lambda part: part.update(folder="other")), "its parts are called 'other'", id="name of a part"),
        pytest.param(nothing, of_statement(lambda s: s.update(run="../../other")), "no folder is called that", id="name of the run"),
        pytest.param(nothing, swap_pictures, "2 pictures are others than packet.json states", id="pictures swapped"),
        pytest.param(swap_names, nothing, "2 times a row names the picture of another row", id="names swapped"),
        pytest.param(name_one_reference_for_another, nothing, "the picture of another row or reference", id="another reference"),
        pytest.param(show_a_generated_picture, nothing, "1 times a row names the picture", id="a generated picture as reference"),
        pytest.param(nothing, with_another("images/", gray_picture()), "1 pictures are others than", id="picture replaced"),
        pytest.param(with_another("images/", b"MZ no picture"), nothing, "is no picture that can be shown (unknown", id="undecodable"),
        pytest.param(with_another("reference/", b""), nothing, "is no picture that can be shown (empty", id="an empty reference"),
        pytest.param(nothing, without_a_picture, "neither there nor accounted for", id="picture taken out"),
        pytest.param(nothing, of_pictures(lambda p: p["sha256"].popitem()), "does not list the pictures", id="sum of a picture taken out"),
        pytest.param(nothing, of_pictures(lambda p: p.update(missing=list(p["sha256"])[:1])), "and are there", id="there and missing"),
        pytest.param(nothing, of_pictures(lambda p: p.update(missing=["images/x.webp"])), "that no row names", id="missing and unknown"),
        pytest.param(nothing, of_pictures(lambda p: p.update(packed=3)), "pictures.packed is 3, and", id="number of pictures"),
        pytest.param(nothing, replace("setup.exe", b"MZ"), "setup.exe is no part of a packet", id="a program"),
        pytest.param(nothing, replace("images/more.webp", gray_picture()), "more.webp is no part of a packet", id="an unnamed picture"),
        pytest.param(nothing, replace("measures/measure.json", b"{}"), "measure.json is damaged", id="measures without pictures"),
        pytest.param(nothing, replace("canaries.json", b"{}"), "canaries.json is no part of a packet", id="records of another kind"),
    ],
)  # fmt: skip
def test_what_only_the_packet_says(
    packed: Path, tmp_path: Path, change: Change, afterwards: Change, fault: str
) -> None:
    faults = faults_of(forge(packed, tmp_path / "forged.zip", change, afterwards))
    assert any(fault in said for said in faults), faults


def test_nothing_is_written_outside_for_a_run_with_the_name_of_another_folder(packed: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    change = of_statement(lambda s: s.update(run=str(tmp_path / "taken")))
    assert faults_of(rewrite(packed, tmp_path / "forged.zip", change, sums=True)) != []
    assert sorted(tmp_path.rglob("*")) == [*before, tmp_path / "forged.zip"]


# Packets of other versions


def earlier(contents: dict[str, bytes]) -> None:
    """As the version before wrote packets: no sums of pictures, and nothing of what parts hold."""

    def change(statement: dict[str, Any]) -> None:
        del statement["pictures"]["sha256"], statement["pictures"]["unreadable"], statement["made_with"]["code"]
        for part in statement["parts"]:
            del part["rows_are_whole"]

    of_statement(change)(contents)


def of_version(**versions: str) -> Change:
    return of_statement(lambda statement: statement["made_with"].update(versions))


def test_a_packet_of_the_version_before_is_sound_and_the_verdict_says_what_was_not_compared(
    packed: Path, tmp_path: Path
) -> None:
    change = both(earlier, replace("report.html", b"<h1>A report of other templates</h1>"))
    result = verify(rewrite(packed, tmp_path / "earlier.zip", change, sums=True))
    assert (result.faults, result.doubts, result.exit_code) == ([], [], 0)
    assert "states no sums of them" in " ".join(result.unchecked)
    assert "report.html: other versions made it" in " ".join(result.unchecked)
    assert result.headline.endswith("Not compared: report.html.")
    assert any("README.txt: made once more" in sentence for sentence in result.checked)


def test_an_earlier_packet_whose_lines_were_not_all_packed_is_sound(packed: Path, tmp_path: Path) -> None:
    change = both(earlier, of_part(lambda part: part["files"].update({"samples.jsonl": "0" * 64})))
    result = verify(rewrite(packed, tmp_path / "earlier.zip", change, sums=True))
    assert result.faults == []
    assert "lines of these were left out" in " ".join(result.unchecked)


def low_bound(value: float) -> Change:
    return of_json("roc.json", lambda roc: roc["scores"][0]["auc"].update(low=value))


@pytest.mark.parametrize(
    "versions", [of_version(numpy="1.26.0"), of_version(mnemoscope="0.0.9"), earlier], ids=["numpy", "ours", "before"]
)
@pytest.mark.parametrize(
    ("change", "code"),
    [
        pytest.param(nothing, 0, id="nothing"),
        pytest.param(of_statement(lambda s: s.update(headline=s["headline"].replace("prompts", "texts"))), 0, id="other words"),
        pytest.param(of_statement(lambda s: s.update(headline="Nothing was memorized.")), 3, id="no numbers"),
        pytest.param(of_statement(lambda s: s.update(headline=re.sub(r"\d", "0", s["headline"]))), 3, id="other numbers"),
        pytest.param(of_statement(lambda s: s.update(not_tested=[])), 3, id="nothing was left untested"),
        pytest.param(of_statement(lambda s: s["found"]["copy_found"].update(low=0.0)), None, id="a bound that is computed"),
        pytest.param(low_bound(0.25), None, id="a bound that is drawn"),
        pytest.param(of_json("roc.json", lambda roc: roc["scores"][0]["auc"].update(value=0.25)), 1, id="a value"),
        pytest.param(of_json("roc.json", lambda roc: roc["missing"].update(other="why")), 1, id="a missing curve"),
    ],
)  # fmt: skip
def test_a_false_version_switches_nothing_off(
    packed: Path, tmp_path: Path, versions: Change, change: Change, code: int | None
) -> None:
    result = verify(rewrite(packed, tmp_path / "forged.zip", both(versions, change), sums=True))
    # Another release may draw and compute bounds in another way, so that only it can say whether they are right.
    expected = code if code is not None else 3 if "0.0.9" in str(result.notes) else 1
    assert result.exit_code == expected, (result.faults, result.doubts)
    assert not (expected == 3 and result.sound)
    assert "other versions" in result.notes[0]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (low_bound(float("nan")), "it holds NaN"),
        (of_json("thresholds.json", lambda t: t.update(rounding=0.9)), "rounding is 0.9"),
    ],
)
def test_records_that_no_forger_could_follow(packed: Path, tmp_path: Path, change: Change, fault: str) -> None:
    assert any(fault in said for said in faults_of(rewrite(packed, tmp_path / "forged.zip", change, sums=True)))


@pytest.mark.parametrize(
    ("method", "low", "faults"),
    [
        ("cluster bootstrap, percentile, 1000 resamples", 0.83, 0),
        ("cluster bootstrap, percentile, 1000 resamples", 0.7, 1),
        ("Clopper–Pearson", 0.8 + 1e-9, 0),
        ("Clopper–Pearson", 0.83, 1),
        ("Clopper–Pearson", None, 1),
        ("cluster bootstrap, percentile, 1000 resamples", float("nan"), 1),
    ],
)  # fmt: skip
def test_bounds_of_resamples_may_be_drawn_a_little_otherwise(method: str, low: float | None, faults: int) -> None:
    interval = {"value": 0.9, "low": 0.8, "high": 0.95, "method": method}
    assert len(list(bounds_apart("roc.json", {"auc": interval | {"low": low}}, {"auc": interval}))) == faults


def test_pictures_of_a_page_may_be_coded_otherwise_but_show_the_same() -> None:
    def page(color: tuple[int, int, int], quality: int) -> bytes:
        data = io.BytesIO()
        Image.new("RGB", (16, 16), color).save(data, "WEBP", quality=quality)
        return b'<img src="data:image/webp;base64,' + base64.b64encode(data.getvalue()) + b'">'

    assert same_page(page((200, 10, 10), 80), page((200, 10, 10), 30))
    assert not same_page(page((200, 10, 10), 80), page((10, 200, 10), 80))
    assert not same_page(page((200, 10, 10), 80), page((200, 10, 10), 80) * 2)
    assert not same_page(page((200, 10, 10), 80), b'<img src="data:image/webp;base64,AAAA">')


# Measured pictures


@pytest.fixture
def measured(run: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(run, tmp_path / "measured"))
    rate = stats.clopper_pearson(31, 32)
    of_one = {"rate": [rate.value, rate.low, rate.high], "at_least": stats.replication_bound(7.68, rate.low)}
    of_other = of_one | {"at_least": stats.replication_bound(15.36, rate.low)}
    write_measures(
        folder / "measures",
        {"aa": {"result": reproduced(0.01, **of_one)}, "bb": {"result": reproduced(0.02, **of_other)}},
    )
    return pack([folder]).path


def of_result(name: str, change: Edit) -> Change:
    return of_json(f"measures/pictures/{name}.json", lambda entry: change(entry["result"]))


def swap_targets(contents: dict[str, bytes]) -> None:
    one, other = (f"measures/pictures/{name}-target.webp" for name in ("aa", "bb"))
    contents[one], contents[other] = contents[other], contents[one]


@pytest.mark.parametrize(
    ("change", "afterwards", "fault"),
    [
        (nothing, nothing, None),
        (of_result("aa", lambda r: r.update(similarity=1.2)), nothing, "as similar as no two pictures are"),
        (of_result("aa", lambda r: r["curve"][0].__setitem__(4, -2.0)), nothing, "as similar as no two pictures are"),
        (of_result("aa", lambda r: r.update(score=0.001)), nothing, "different numbers of dimensions"),
        (nothing, swap_targets, "2 pictures are others than packet.json states"),
        (nothing, replace("measures/report.html", b"<h1>Nothing</h1>"), "measures/report.html is not what follows"),
        (nothing, lambda c: c.pop("measures/report.html"), "it holds no measures/report.html"),
        (replace("measures/pictures/aa-target.webp", b"x"), nothing, "aa-target.webp is no picture that can be shown"),
        (nothing, replace("measures/pictures/cc-target.webp", gray_picture()), "cc-target.webp is no part of a packet"),
    ],
)  # fmt: skip
def test_measured_pictures(
    measured: Path, tmp_path: Path, change: Change, afterwards: Change, fault: str | None
) -> None:
    faults = faults_of(forge(measured, tmp_path / "forged.zip", change, afterwards))
    assert faults == [] if fault is None else any(fault in said for said in faults), faults


# The archive


def add_entry(packed: Path, out: Path, entry: zipfile.ZipInfo, data: bytes = b"x") -> Path:
    shutil.copy(packed, out)
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr(entry, data)
    return out


def entry_of(name: str, *, mode: int = 0o644, comment: bytes = b"", extra: bytes = b"") -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr, entry.comment, entry.extra = 3, mode << 16, comment, extra
    return entry


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        (entry_of("images/link.webp", mode=0o120777), "is a link"),
        (entry_of("images/pipe.webp", mode=0o010644), "is no regular file"),
        (entry_of("images/device.webp", mode=0o060644), "is no regular file"),
        (entry_of("images/x.webp", comment=b"hidden"), "has a comment"),
        (entry_of("images/x.webp", extra=struct.pack("<2H", 0x7075, 7) + b"\x01\0\0\0\0ab"), "has a second name"),
        (entry_of("images\\x.webp"), "none that every system allows"),
        (entry_of("C:x.webp"), "none that every system allows"),
        (entry_of("images/CON"), "none that every system allows"),
        (entry_of("images/nul.webp"), "none that every system allows"),
        (entry_of("images/Lpt1 .webp"), "none that every system allows"),
        (entry_of("images/x.webp."), "none that every system allows"),
        (entry_of("images /x.webp"), "none that every system allows"),
        (entry_of("/etc/x.webp"), "leads out of a folder"),
        (entry_of("../x.webp"), "leads out of a folder"),
        (entry_of("Run.JSON"), "is there twice"),
        (entry_of("run.json/x"), "run.json is there as a file and as a folder"),
        (entry_of("REPORT.html/x.webp"), "report.html is there as a file and as a folder"),
    ],
)  # fmt: skip
def test_names_and_kinds_of_files(packed: Path, tmp_path: Path, entry: zipfile.ZipInfo, fault: str) -> None:
    faults = faults_of(add_entry(packed, tmp_path / "forged.zip", entry))
    assert any(fault in said for said in faults), faults
    with Archive(tmp_path / "forged.zip") as archive:
        assert entry.filename not in archive.names or "as a folder" in fault


def test_names_that_are_one_file_on_some_systems() -> None:
    assert same_name("images/\u00e9.webp") == same_name("images/e\u0301.webp") == same_name("IMAGES/\u00c9.webp")
    assert same_name("stra\u00dfe") == same_name("STRASSE")
    assert same_name("a") != same_name("b")


@pytest.mark.parametrize("name", ["aux.webp/a", "a/PRN", "com1", "COM\u00b9.txt", "a/b.", "a./b", "a /b", "conin$"])
def test_names_of_devices_and_names_that_end_in_a_dot_are_not_plain(name: str) -> None:
    assert not plain(name)


@pytest.mark.parametrize("name", ["console.webp", "images/communion1.webp", " a/.b", "a/b c.d", "nulls", "com10"])
def test_names_that_only_resemble_devices_are_plain(name: str) -> None:
    assert plain(name)


def zip_of(*parts: tuple[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in parts:
            archive.writestr(name, content)
    return data.getvalue()


def shift(data: bytes, by: int, *, entries: bool) -> bytes:
    """An archive with bytes in front of it, whose offsets count them."""
    shifted = bytearray(data)
    end = shifted.rfind(b"PK\x05\x06")
    (start,) = struct.unpack_from("<L", shifted, end + 16)
    struct.pack_into("<L", shifted, end + 16, start + by)
    place = start
    while entries and shifted[place : place + 4] == b"PK\x01\x02":
        (offset,) = struct.unpack_from("<L", shifted, place + 42)
        struct.pack_into("<L", shifted, place + 42, offset + by)
        lengths = struct.unpack_from("<3H", shifted, place + 28)
        place += 46 + sum(lengths)
    return bytes(shifted)


def commented(data: bytes) -> bytes:
    return data[:-2] + struct.pack("<H", 5) + b"hello"


def with_hidden_bytes(data: bytes) -> bytes:
    """Bytes between the last file and the list of files."""
    end = data.rfind(b"PK\x05\x06")
    (start,) = struct.unpack_from("<L", data, end + 16)
    return shift(data, 6, entries=False)[:start] + b"hidden" + shift(data, 6, entries=False)[start:]


def other_header(place: int, value: bytes) -> Callable[[bytes], bytes]:
    """The first file described otherwise in front of its bytes than in the list."""
    return lambda data: data[:place] + value + data[place + len(value) :]


def encrypted(data: bytes) -> bytes:
    raw = bytearray(data)
    raw[6] |= 1
    raw[data.find(b"PK\x01\x02") + 8] |= 1
    return bytes(raw)


def overlapping(data: bytes) -> bytes:
    """The second file's entry leads to the bytes of the first."""
    raw = bytearray(data)
    first = data.find(b"PK\x01\x02")
    second = data.find(b"PK\x01\x02", first + 4)
    struct.pack_into("<L", raw, second + 42, struct.unpack_from("<L", raw, first + 42)[0])
    return bytes(raw)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda data: b"MZ program" + data, "bytes before its first file"),
        (lambda data: b"MZ program" + shift(data, 10, entries=True), "bytes before"),
        (lambda data: data + b"more", "bytes after its end"),
        (commented, "it has a comment"),
        (with_hidden_bytes, "bytes before its list of files"),
        (other_header(30, b"RUN"), "described in two ways (another name)"),
        (other_header(8, b"\0\0"), "described in two ways (another kind)"),
        (other_header(22, b"\x01\0\0\0"), "described in two ways (other sizes)"),
        (encrypted, "run.json is encrypted"),
        (overlapping, "lies over another file"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_part_of_a_file(
    packed: Path, tmp_path: Path, change: Callable[[bytes], bytes], fault: str
) -> None:
    forged = tmp_path / "forged.zip"
    forged.write_bytes(change(packed.read_bytes()))
    faults = faults_of(forged)
    assert any(fault in said for said in faults), faults


def test_archives_of_other_programs_are_read(packed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(packed) as old:
        contents = {name: old.read(name) for name in old.namelist()}

    class Pipe(io.RawIOBase):
        """Takes bytes in order and cannot go back, so that sizes stand behind the files."""

        data = b""

        def writable(self) -> bool:
            return True

        def write(self, piece: Any) -> int:
            self.data += bytes(piece)
            return len(piece)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in contents.items():
            new.writestr(name, data)
        new.writestr("images/", b"")
    again = tmp_path / "again.zip"
    again.write_bytes(pipe.data)
    assert faults_of(again) == []
    lied = tmp_path / "lied.zip"
    lied.write_bytes(pipe.data.replace(b"PK\x07\x08", b"PK\x07\x09", 1))
    assert any("other sizes" in fault for fault in faults_of(lied))


def test_large_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "large.zip"
    with zipfile.ZipFile(path, "w") as archive, archive.open("run.json", "w", force_zip64=True) as file:
        file.write(b"{}")
    with Archive(path) as archive:
        assert archive.faults == []
        assert archive.read("run.json") == b"{}"


@pytest.mark.parametrize(
    "name", ["run.json", "README.txt", "packet.json", "images/x.webp", "thresholds-a.json", "report.html"]
)
def test_each_kind_of_file_has_a_limit_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    limits = {"LARGEST": {"run.json": 10, "README.txt": 10}, "LARGEST_OF_KIND": {".json": 10}, "LARGEST_PICTURE": 10}
    for limit, value in limits.items():
        monkeypatch.setattr(archives, limit, value)
    monkeypatch.setattr(archives, "GROWING", {"packet.json": 6, "report.html": 6})
    path = tmp_path / "a.zip"
    path.write_bytes(zip_of(("samples.jsonl", b"rows"), (name, b"0123456789")))
    with Archive(path) as archive:
        assert len(archive.read(name)) == 10
    path.write_bytes(zip_of(("samples.jsonl", b"rows"), (name, b"0123456789a")))
    with Archive(path) as archive, pytest.raises(RunError, match=f"{name} has 11 bytes, and the limit is 10"):
        archive.read(name)


def test_archives_of_many_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "many.zip"
    with monkeypatch.context() as patch:
        patch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
        path.write_bytes(zip_of(("run.json", b"{}"), ("samples.jsonl", b"")))
    assert b"PK\x06\x06" in path.read_bytes()
    with Archive(path) as archive:
        assert (archive.faults, len(archive.names)) == ([], 2)


def test_one_file_that_unpacks_to_far_more_than_it_is_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("samples.jsonl", bytes(1 << 25))
        archive.writestr("images/x.webp", b"x")
    with pytest.raises(RunError, match="it is not unpacked"):
        Archive(path)


# Packing


def test_a_picture_that_cannot_be_decoded_is_left_out_with_the_reason(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "own"))
    name = next(row.image for row in Run(folder).rows() if row.image)
    (folder / name).write_bytes(b"torn")
    packet = pack([folder]).path
    pictures = member(packet, "packet.json")["pictures"]
    assert pictures["unreadable"][name].startswith("unknown: in none of the formats")
    assert pictures["left_out"] == {name: archives.sha256_file(folder / name)}
    result = verify(packet)
    assert result.faults == []
    assert any("could not be decoded" in note and name[:20] in note for note in result.notes)


def test_a_run_with_lines_that_are_not_packed_says_so(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "own"))
    with (folder / "samples.jsonl").open("ab") as file:
        file.write(b'{"id": "half a li')
    packet = pack([folder]).path
    assert member(packet, "packet.json")["parts"][0]["rows_are_whole"] is False
    result = verify(packet)
    assert result.faults == []
    assert "lines of these were left out" in " ".join(result.unchecked)


def test_what_a_packet_tells_to_read_by_hand_is_what_it_holds(packed: Path) -> None:
    with zipfile.ZipFile(packed) as archive:
        assert archive.read("README.txt").decode() == READ_ME
