"""``mnemoscope index`` and ``mnemoscope duplicates``: what a person types, and what comes out."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from mnemoscope.detect.calibrate import Calibration
from mnemoscope.errors import RunError, UsageError
from mnemoscope.records.schema import Manifest, Nearest, Row, Score
from mnemoscope.records.store import Run, Writer


def smooth(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((32, 32), Image.Resampling.BILINEAR)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Eight pictures: one of them three times, another broken."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        smooth(i).save(tmp_path / f"pictures/{i}.png")
    for name in "ab":
        smooth(3).save(tmp_path / f"pictures/3{name}.png", compress_level=1)
    (tmp_path / "pictures/zero.png").write_bytes(b"")
    return tmp_path / "pictures"


def test_build_info_query(run, pictures):
    code, out, err = run("index", "build", "pictures", "--out", "refs", "--descriptor", "pixels")
    assert code == 0, err
    assert err.startswith("Indexing pictures …")
    assert "pictures\t10" in out
    assert "skipped\t1 empty" in out
    assert "not calibrated" in out
    code, out, _ = run("index", "info", "refs", "--json")
    facts = json.loads(out)
    assert (code, facts["pictures"], facts["skipped"], facts["search"]) == (0, 10, {"empty": 1}, "exact")
    assert facts["descriptor"]["maker"] == "pixels"
    assert len(facts["hashes"]["rows.jsonl"]) == 64
    code, out, _ = run("index", "query", "refs", "pictures/5.png", "-k", 2)
    lines = [line.split("\t") for line in out.splitlines()]
    assert lines[0] == ["picture", "rank", "reference", "pixels-16", "copy"]
    assert lines[1] == ["pictures/5.png", "1", "5.png", "1.0000", "not calibrated"]
    assert len(lines) == 3


def test_an_index_that_was_sent_says_what_it_does_not_show(run, pictures, tmp_path):
    run("index", "build", "pictures", "--out", "refs")
    manifest = tmp_path / "refs/manifest.json"
    facts = json.loads(manifest.read_bytes())
    facts["sources"][0] |= {"path": "/elsewhere"}
    manifest.write_text(json.dumps(facts))
    sentence = "mnemoscope index locate refs PICTURES"
    for words in (["query", "refs", "pictures/5.png"], ["info", "refs"]):
        code, _, err = run("index", *words)
        assert (code, err.count(sentence)) == (0, 1)
    assert run("index", "locate", "refs", "nowhere")[0] == 2
    code, _, err = run("index", "locate", "refs", "pictures")
    assert (code, err) == (0, "The pictures of refs are shown from pictures.\n")
    assert sentence not in run("index", "info", "refs")[2]


def drop_row(folder):
    (folder / "rows.jsonl").write_bytes(b"".join((folder / "rows.jsonl").read_bytes().splitlines(True)[1:]))


def blank_vectors(folder):
    file = folder / "vectors.bin"
    file.write_bytes(np.full(file.stat().st_size // 4, np.nan, "<f4").tobytes())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [(drop_row, "refs/rows.jsonl holds 10 of 11 rows"), (blank_vectors, "refs/vectors.bin is not the file that")],
)
@pytest.mark.parametrize(
    "words",
    [
        ["index", "query", "refs", "pictures/5.png"],
        ["index", "info", "refs"],
        ["index", "info", "refs", "--json"],
        ["duplicates", "refs", "--out", "dup"],
        ["audit", "demo", "--prompts", "prompts.txt", "--reference", "refs", "--out", "run"],
    ],
    ids=" ".join,
)
def test_an_index_that_does_not_fit_its_manifest_is_one_sentence(run, pictures, tmp_path, change, sentence, words):
    run("index", "build", "pictures", "--out", "refs", "--descriptor", "pixels")
    change(tmp_path / "refs")
    (tmp_path / "prompts.txt").write_text("a small house\n")
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert sentence in err
    assert "Traceback" not in err


def test_an_index_says_what_of_it_is_checked(run, pictures, tmp_path):
    run("index", "build", "pictures", "--out", "refs", "--descriptor", "pixels")
    assert "checked\tsizes, counts, hashes and lengths of vectors" in run("index", "info", "refs")[1]
    manifest = tmp_path / "refs/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_bytes()) | {"hashes": {}, "rows": None, "vectors": None}))
    code, out, err = run("index", "info", "refs")
    assert code == 0
    assert "no hash is recorded" in out
    assert "refs records no hash of its rows and vectors" in err
    assert json.loads(run("index", "info", "refs", "--json")[1])["checked"].endswith("no hash is recorded")


def test_queries_of_folders_and_broken_pictures(run, pictures):
    run("index", "build", "pictures", "--out", "refs")
    code, out, _ = run("index", "query", "refs", "pictures", "pictures/zero.png", "--json", "-k", 1)
    found = {p["picture"]: p for p in json.loads(out)["pictures"]}
    assert code == 0
    assert found["4.png"]["nearest"][0]["reference"] == "4.png"
    assert found["zero.png"]["nearest"] == []
    assert found["pictures/zero.png"]["reason"] == "empty: the file has no bytes"


def test_a_threshold_from_other_pictures(run, pictures, tmp_path):
    (tmp_path / "others").mkdir()
    for i in range(30):
        smooth(100 + i).save(tmp_path / f"others/{i}.png")
    code, out, _ = run("index", "build", "pictures", "--out", "refs", "--different", "others", "--fmr", 0.1)
    assert code == 0
    assert "at 10 % false matches, from 30 pictures" in out
    _, out, _ = run("index", "query", "refs", "pictures/5.png", "others/3.png", "-k", 1)
    assert [line.split("\t")[-1] for line in out.splitlines()] == ["copy", "copy", "no"]
    code, _, err = run("index", "build", "pictures", "--out", "refs", "--different", "others")
    assert code == 2
    assert "30 different pictures cannot state a false-match rate of 0.01; give at least 99" in err


def test_the_same_command_continues_with_the_same_descriptor(run, pictures):
    assert (
        run("index", "build", "pictures", "--out", "refs", "--descriptor", "pixels", "--descriptor-option", "side=8")[0]
        == 0
    )
    smooth(50).save(pictures / "50.png")
    code, out, _ = run("index", "build", "pictures", "--out", "refs")
    assert code == 0
    assert "descriptor\tpixels-8" in out
    assert "pictures\t11" in out
    code, _, err = run("index", "build", "pictures", "--out", "refs", "--descriptor-option", "side=16")
    assert code == 2
    assert "was made with another descriptor" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["index", "build", "nowhere"], "nowhere does not exist"),
        (["index", "build", "pictures", "--descriptor", "pixel"], "Did you mean 'pixels'?"),
        (["index", "build", "pictures", "--descriptor-option", "side"], "write name=value"),
        (
            ["index", "build", "pictures", "--descriptor", "pixels", "--descriptor-option", "sise=3"],
            "Did you mean 'side'?",
        ),
        (["index", "build", "pictures", "--dtype", "float8"], "no dtype of an index named 'float8'"),
        (["index", "info", "nowhere"], "nowhere holds no index"),
        (["index", "query", "nowhere", "x.png"], "nowhere holds no index"),
        (["index", "bild"], "No such command 'bild'"),
        (["duplicates", "nowhere"], "nowhere does not exist"),
        (["duplicates", "pictures", "--threshold", "1"], "must be a similarity above -1 and below 1"),
        (["duplicates", "pictures", "--run", "nowhere"], "nowhere holds no run"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_2(run, pictures, words, sentence):
    code, out, err = run(*words)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    "command", [["index", "build"], ["index", "query"], ["index", "info"], ["index", "locate"], ["duplicates"]]
)
def test_every_command_has_an_example(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert f"Example: mnemoscope {' '.join(command)} " in out


def test_the_first_line_comes_before_torch():
    code = (
        "import sys, time\n"
        "from mnemoscope.cli import index, duplicates, screen\n"
        "from mnemoscope.similarity.storage import IndexFolder\n"
        "sys.exit('torch' in sys.modules)"
    )
    began = time.perf_counter()
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert time.perf_counter() - began < 60


def test_duplicates_of_a_folder(run, pictures):
    code, out, err = run("duplicates", "pictures", "--out", "dup", "--descriptor", "pixels")
    assert code == 0, err
    assert (
        "3 of 10 pictures with a near-duplicate (pixels-16 above 0.98), in 1 cluster; 2 pictures could go, 1 of them"
        in out
    )
    assert "Not looked at: 1 empty" in err
    assert (pictures.parent / "dup/sheets/cluster-0.webp").is_file()
    code, out, _ = run("duplicates", "dup/index", "--out", "dup2", "--json", "--threshold", 0.999)
    facts = json.loads(out)
    assert code == 0
    assert (facts["clusters"], facts["largest"], facts["identical_files"], facts["threshold"]) == (1, 3, 1, 0.999)
    assert facts["worst"][0]["first"] == "3.png"


def audited(folder, *, thresholds=True, ids=True):
    """A run of one caption per picture: what stands three times comes back."""
    run = Run.open(folder, Manifest(asked=8))
    rows = []
    for i in range(8):
        nearest = Nearest(
            reference=f"{i}.png", similarity=0.9, descriptor="pixels-16", threshold=0.8, copy_found=i == 3
        )
        score = Score(value=9.0 if i in (3, 4) else 1.0, space="eps", per_step=[1.0])
        prompt_id = f"{i}.png" if ids else f"hash-{i}"
        more = {"scores": {"magnitude": score}, "nearest": nearest}
        rows.append(Row(id=f"{i:020x}", prompt_id=prompt_id, prompt=f"picture, {i}", seed=0, status="ok", **more))
    with Writer(run) as out:
        out.append(rows)
    if thresholds:
        made = Calibration.fit([1.0, 2.0], {"steps": 50}, detector="magnitude", fpr=0.5)
        made.save(folder / "thresholds.json")


def test_duplicates_joined_with_an_audit(run, pictures, tmp_path):
    audited(tmp_path / "run")
    code, out, err = run("duplicates", "pictures", "--out", "dup", "--run", "run")
    assert code == 0, err
    table = [line.split("\t") for line in out.splitlines() if "\t" in line][-3:]
    assert table[0] == ["cluster size", "clusters", "captions", "above threshold", "copy found", "of its own cluster"]
    assert table[1][:3] == ["1", "7", "7"]
    assert table[1][3].startswith("1/7")
    assert table[1][4].startswith("0/7")
    assert [table[2][i] for i in (0, 1, 2, 5)] == ["3", "1", "1", "1"]
    assert table[2][4].startswith("1/1")
    svg = (tmp_path / "dup/copies.svg").read_text(encoding="utf-8")
    assert svg.startswith("<svg")
    assert "<style>" in svg
    assert "3 copies in training: 1 of 1" in svg
    from xml.etree import ElementTree

    ElementTree.fromstring(svg)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_captions_from_the_metadata_of_the_folder(run, pictures, tmp_path, name):
    audited(tmp_path / "run", thresholds=False, ids=False)
    code, _, err = run("duplicates", "pictures", "--out", "dup", "--run", "run")
    assert code == 2
    assert "none of 8 captions belongs to a picture of the set" in err
    pairs = [(f"{i}.png", f"picture, {i}") for i in range(8)]
    if name.endswith("csv"):
        text = "file_name,text\n" + "".join(f'{a},"{b}"\n' for a, b in pairs)
    else:
        text = "".join(json.dumps({"file_name": a, "text": b}) + "\n" for a, b in pairs)
    (tmp_path / name).write_text(text, encoding="utf-8")
    code, out, err = run("duplicates", "pictures", "--out", "dup", "--run", "run", "--captions", name, "--json")
    assert code == 0, err
    assert "no thresholds.json" in err
    levels = json.loads(out)["by_cluster_size"]["levels"]
    assert [(level["low"], level["captions"], level["copies"]["k"], level["above"]) for level in levels] == [
        (1, 7, 0, None),
        (3, 1, 1, None),
    ]
    (tmp_path / name).write_text("file_name,title\n1.png,x\n" if name.endswith("csv") else '{"file_name": "1.png"}\n')
    code, _, err = run("duplicates", "pictures", "--out", "dup", "--run", "run", "--captions", name)
    assert code == 2
    assert "row 1 of" in err


def test_a_folder_of_few_pictures_serves_as_a_reference(pictures, monkeypatch, tmp_path):
    from mnemoscope.cli import opening
    from mnemoscope.similarity.nulls import null_of

    index = opening.reference_set("pictures", None)
    assert len(index) == 10  # all but the broken one
    # Ten pictures may together be mistaken in at most 5 % of searches: one pair in a thousand, not one in a hundred.
    assert index.threshold == null_of(index.name)["thresholds"]["0.001"]
    (match,) = index.nearest(torch.from_numpy(np.array(smooth(5))).permute(2, 0, 1)[None] / 255)
    assert (match.reference, match.copy_found) == ("5.png", True)
    assert not list(tmp_path.rglob("manifest.json"))  # nothing is left among the pictures
    monkeypatch.setattr(opening, "FEW", 3)
    with pytest.raises(UsageError, match=r"11 pictures and no index; make one with `mnemoscope index build pictures"):
        opening.reference_set("pictures", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="empty holds no index"):
        opening.reference_set("empty", None)
