"""The report of measured pictures: what it says, what it never says, and that it asks nothing of anybody."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import measured_folder as made
import pytest
from parsed import Parsed

from mnemoscope.errors import RunError, UsageError
from mnemoscope.records.measures import Entry, Measures, is_measures
from mnemoscope.report import measured, measured_page

HOSTILE = "<script>alert(1)</script> & \u202eevil"


@pytest.fixture
def folder(tmp_path):
    entries = {
        "a1": {"result": made.reproduced(0.031), "caption": HOSTILE, "companions": {"flipd": 12.5, "secmi": None}},
        "b2": {"result": made.reproduced(0.0004, at_least=1e-40), "caption": "a cat"},
        "c3": {"result": made.censored(0.0713), "image": "pics/c3.png"},
        "d4": {
            "result": None,
            "status": "screened out",
            "companions": {"flipd": 90.0},
            "screen": {"name": "flipd", "share": 0.5},
        },
    }
    return made.write(tmp_path / "out", entries)


def page(folder, **options):
    return Parsed(measured_page.write_report(folder, **options).read_text(encoding="utf-8"))


def test_one_sentence_says_what_was_measured(folder):
    text = page(folder).text
    assert (
        "4 pictures measured on tiny (fingerprint 0123456789abcdef) by preset improved: 2 reproduced, 1 not within the budget, "
        "1 screened out" in text
    )


def test_the_most_strongly_stored_come_first(folder):
    assert [e.id for e in Measures.read(folder).entries] == ["b2", "a1", "c3", "d4"]
    html = page(folder).html
    assert html.index("0.0004") < html.index("0.0310") < html.index("&gt; 0.0713") < html.index("not tried")


def test_a_censored_picture_is_more_than_a_number_and_never_infinite(folder):
    found = page(folder)
    assert "> 0.0713" in found.text
    assert "not reproduced within 300 updates; the nearest test had similarity 0.42" in found.text
    assert not re.search(r"\b(inf|nan|Infinity|NaN|None)\b", found.text)
    (row,) = [r for r in json.loads(measured_page.write_json(folder).read_text())["pictures"] if r["id"] == "c3"]
    assert row["score"] is None
    assert row["paid"] == 0.0713


def test_nothing_is_asked_of_any_server_and_no_caption_becomes_markup(folder):
    found = page(folder)
    assert not [tag for tag, _ in found.tags if tag in ("script", "link", "iframe", "object", "embed", "form")]
    addresses = [
        v for _, attrs in found.tags for k, v in attrs.items() if k in ("src", "href", "action", "srcset", "data")
    ]
    assert addresses
    assert all(v.startswith("data:image/webp;base64,") for v in addresses)
    assert "<script>alert(1)</script>" in found.text  # as words
    assert "\u202e" not in found.html
    policy = [a["content"] for t, a in found.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0].startswith("default-src 'none'; img-src data:")


def test_pictures_draws_and_curves_are_shown(folder):
    found = page(folder)
    alts = [a["alt"] for t, a in found.tags if t == "img"]
    assert len(alts) == 3 + 3 * 4  # what was not tried is in the table only
    assert sum(a.startswith("The measured picture") for a in alts) == 3
    assert "from the noise that was found, guidance 3" in found.text
    assert "guidance 3, as none that was tried reached it" in found.text
    assert found.text.count("How the search went") == 3
    assert "after 150 updates: loss 0.04, λ 0.4, KL 0.04, nearest similarity 0.91" in found.text


def test_reproduced_pictures_are_blurred_until_asked_for(folder):
    veils = [a for t, a in page(folder).tags if t == "label" and a.get("class") == "veil"]
    assert len(veils) == 2
    assert not [a for t, a in page(folder, blur=False).tags if t == "label"]


def test_confirmation_and_bound_are_said_in_words(folder):
    text = page(folder).text.replace("\u00a0", " ")
    assert "fresh draws that succeeded: 31 of 32 (97 %, 95 % interval 84–100 %)" in text
    assert "Plain noise leads to it at least once in 83 draws, under the same prompt, guidance and sampler." in text
    assert "so small (1e-40) that it says next to nothing" in text
    assert "12,000 forwards (F) and 7,200 backward passes (B)" in text


@pytest.mark.parametrize(
    ("p", "words"), [(0.68, "at least 68 %"), (0.5, "at least 50 %"), (1e-4, "once in 10,000 draws"), (0.0, "less than any number"),
                     (None, "Without fresh draws")],
)  # fmt: skip
def test_bounds(p, words):
    assert words in measured.bound_words(Entry(id="a", image="a", result=made.reproduced(0.1, at_least=p)))


def test_what_was_screened_out_is_named_with_its_screen(folder):
    text = page(folder).text
    assert "1 picture was not tried, because a cheap measure (flipd) found others more suspicious" in text
    assert "What the screen misses was not looked at" in text


def test_companions_stand_beside_the_score(folder, tmp_path):
    text = page(folder).text
    assert "flipd" in text
    assert "12.5" in text
    assert "90" in text
    bare = made.write(tmp_path / "bare", {"a1": {"result": made.reproduced(0.1)}})
    assert "flipd" not in page(bare).text


def test_no_levels_are_invented(folder):
    text = page(folder).text
    assert "No pictures of known dose were measured with this model and preset" in text
    assert "copies in training" not in text


def test_levels_of_the_same_setting_are_drawn(folder, tmp_path):
    file = tmp_path / "levels.json"
    file.write_text(json.dumps(made.REQUEST | {"levels": {"0": [0.4, None], "48": [0.001, 0.002, 0.003]}}))
    text = page(folder, levels=file).text
    assert "48 copies in training: 3 of 3 reached; never trained on: 1 of 2 reached" in text
    assert "No pictures of known dose" not in text
    (folder / "measure.json").write_text(
        json.dumps(made.REQUEST | {"asked": ["a1"], "levels": {"1": [0.2]}, "target": {"name": "tiny"}})
    )
    assert "1 copy in training: 1 of 1 reached" in page(folder).text


def test_levels_of_other_prompts_are_refused(tmp_path):
    file = tmp_path / "levels.json"
    file.write_text(json.dumps(made.REQUEST | {"levels": {"48": [0.001]}, "prompts": "caption"}))
    for name, prompt, caption, drawn in (
        ("a", "given", "a cat", True), ("b", "given", "", False), ("c", "learned", None, False), ("d", "none", None, False)
    ):  # fmt: skip
        result = made.reproduced(0.1) | {"prompt": prompt}
        folder = made.write(tmp_path / name, {"a1": {"caption": caption, "result": result}})
        text = page(folder, levels=file).text
        assert ("48 copies in training" in text) is drawn
        assert ("their prompts were of another kind (caption there" in text) is not drawn


def test_levels_of_another_setting_are_refused_with_the_difference(folder, tmp_path):
    file = tmp_path / "levels.json"
    other = made.REQUEST | {"preset": made.PRESET | {"updates": 2000}, "levels": {"48": [0.001]}}
    file.write_text(json.dumps(other))
    text = page(folder, levels=file).text
    assert "they do not compare: they were measured under another setting (preset.updates: was 2000, now 300)" in text
    assert "48 copies" not in text
    with pytest.raises(RunError, match="is missing"):
        measured_page.write_report(folder, levels=tmp_path / "none.json")


@pytest.mark.parametrize(
    "content", ["", '{"id": "a1", "ima', "[]", '{"id": "../../x", "image": "a"}', '{"id": "a1", "image": 3}']
)
def test_a_torn_or_foreign_file_is_one_sentence(folder, content):
    (folder / "pictures" / "a1.json").write_text(content)
    with pytest.raises(RunError, match=r"a1\.json .* or delete it, and the same `mnemoscope measure`") as error:
        measured_page.write_report(folder)
    assert "\n" not in str(error.value)


def test_a_damaged_request_is_one_sentence(folder, tmp_path):
    (folder / "measure.json").write_text("{")
    with pytest.raises(RunError, match=r"measure\.json cannot be read"):
        measured_page.write_report(folder)
    with pytest.raises(RunError, match=r"holds no measure\.json; give the folder"):
        measured_page.write_report(tmp_path)
    with pytest.raises(UsageError, match="shown = -1"):
        measured_page.write_report(folder, shown=-1)


def test_what_is_not_finished_is_counted(folder):
    (folder / "pictures" / "b2.json").unlink()
    text = page(folder).text
    assert "1 still to be measured" in text
    assert "1 picture that was asked for is not finished; the same command continues." in text


def test_results_of_another_setting_are_left_out(folder):
    other = made.reproduced(0.0, preset="improved with updates 5")
    (folder / "pictures" / "ee.json").write_text(
        json.dumps({"id": "ee", "image": "e.png", "caption": None, "result": other})
    )
    assert len(Measures.read(folder).entries) == 4
    (folder / "measure.json").write_text(json.dumps(made.REQUEST))  # as an earlier version wrote it: without ids
    assert {e.id for e in Measures.read(folder).entries} == {"a1", "b2", "c3", "d4"}


def test_markdown_has_a_row_for_each_picture(folder):
    text = measured_page.write_markdown(folder).read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == 4
    assert len({row.count(" |") for row in rows}) == 1
    assert "\\<script\\>" in text


def test_a_folder_is_told_from_a_run(folder, tmp_path):
    assert is_measures(folder)
    assert not is_measures(tmp_path)
    (folder / "run.json").write_text("{}")
    assert not is_measures(folder)


def test_equal_folders_give_equal_pages(folder, tmp_path):
    assert (
        measured_page.write_report(folder, tmp_path / "a.html").read_bytes()
        == measured_page.write_report(folder, tmp_path / "b.html").read_bytes()
    )


@pytest.mark.parametrize("module", ["mnemoscope.records.measures", "mnemoscope.report.measured_page"])
def test_opens_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
