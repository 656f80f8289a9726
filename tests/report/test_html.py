"""The page: self-contained, harmless whatever the prompts say, complete, and the same numbers everywhere."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from parsed import Parsed
from PIL import Image
from synthetic_run import make_run

from mnemoscope.errors import RunError, UsageError
from mnemoscope.records.schema import Nearest
from mnemoscope.records.store import Run
from mnemoscope.report import pictures as module
from mnemoscope.report.findings import Shot
from mnemoscope.report.html import write_json, write_markdown, write_report
from mnemoscope.report.pictures import SIDE, Pictures, Thumbnails
from mnemoscope.report.summary import read_summary
from mnemoscope.similarity.decoding import COLLECTED, KEPT, decode

HOSTILE = {
    12: "<script>alert(1)</script><img src=x onerror=alert(1)>",
    13: "\u202egnp.exe صورة حمراء",
    14: "nul \x00 bell \x07 escape \x1b[31m",
    15: "word " * 2000,
    16: "😀🎨 👩‍👩‍👧",
    17: "",
    18: "a`|*_#[x](http://evil.example) {{ 7*7 }} {% raw %} www.evil.example &lt;b&gt;\n\n| - 1. \n# head",
    19: "\"><svg onload=alert(1)><style>*{display:none}</style>'",
}


OURS = set(
    """html head meta title style body main header footer section article div p span h1 h2 dl dt dd ul li figure figcaption
    img label input table thead tbody tr th td bdi details summary pre code a br small
    svg g rect line polyline polygon circle path text title desc""".split()  # noqa: SIM905 (a wall of quotes is no clearer)
)
"""Every element the templates use; anything else came in through a prompt."""


class Page(Parsed):
    """Which can be asked for tags of a class."""

    def all(self, tag: str, class_: str = "") -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and set(class_.split()) <= set((a.get("class") or "").split())]


def page(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "demo-1", per_group=3)


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """A larger run whose prompts have known labels, and its summary."""
    made = make_run(tmp_path_factory.mktemp("labeled") / "demo-2", per_group=6, labels=True)
    return made, read_summary(made)


@pytest.fixture(scope="module")
def report(labeled):
    return page(write_report(labeled[0]))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Prompts of the groups that sort first are replaced by nasty ones."""
    return make_run(tmp_path_factory.mktemp("hostile") / "run<b>&amp;", per_group=6, prompts=HOSTILE)


# Nothing leaves the page ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["report", "hostile"])
def test_the_page_asks_for_nothing(which, request, report):
    found = report if which == "report" else page(write_report(request.getfixturevalue("hostile"), shown=30))
    names = {tag for tag, _ in found.tags}
    assert not names & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "audio",
        "video",
        "source",
        "use",
    }
    for tag, attributes in found.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "srcset", "data", "action", "background", "poster"):
                assert value.startswith("data:image/webp;base64,")
            if name in ("href", "xlink:href"):
                assert value.startswith("#")
    styles = "".join(re.findall(r"<style>(.*?)</style>", found.html, re.DOTALL))
    assert "url(" not in styles
    assert "@import" not in styles
    assert all("url(" not in (a.get("style") or "") for _, a in found.tags)


def test_a_policy_holds_the_page_to_it(report):
    (policy,) = [a["content"] for a in report.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert rules["style-src"] == "'unsafe-inline'"


def test_hostile_prompts_are_shown_as_text(hostile):
    path = write_report(hostile, shown=30)
    raw = path.read_bytes()
    found = Page(raw.decode("utf-8"))
    assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]", raw)
    assert "\u202e" not in found.html
    for prompt in (
        HOSTILE[12],
        HOSTILE[19],
        "⟨U+202E⟩gnp.exe",
        "nul ␀ bell ␇ escape ␛[31m",
        "{{ 7*7 }} {% raw %}",
        "&lt;b&gt;",
    ):
        assert prompt in found.text
    assert "(empty prompt)" in found.text
    assert "word … (10,000 characters)" in found.text
    assert len([a for a in found.all("bdi") if a.get("dir") == "auto"]) >= len(HOSTILE)
    assert {t for t, _ in found.tags} <= OURS


def test_every_figure_is_well_formed(report, hostile):
    for html in (report.html, write_report(hostile).read_text(encoding="utf-8")):
        figures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
        assert len(figures) > 10
        for figure in figures:
            ElementTree.fromstring(figure)


# What is there --------------------------------------------------------------------------------------------------------


def test_sections_come_in_the_order_of_the_questions(report):
    order = [
        "Memorization audit of demo",
        "A copy of a reference image was found for",
        "Above threshold",
        "The worst prompts",
        "What this does not tell",
        "Scores of audited and ordinary prompts",
        "Scores over the denoising steps",
        "Groups",
        "Copies found against copies in training",
        "How well the score separates prompts of known label",
        "Reproduction",
        "Prompts, one by one",
        "A score is evidence, not a verdict.",
    ]
    body = report.text[report.text.index(order[0], 100) :]
    places = [body.index(words) for words in order]
    assert places == sorted(places)


def test_page_and_summary_say_the_same(labeled, report):
    summary = labeled[1]
    for words in (summary.headline, summary.subline, *summary.untested, *(f.share.bounds for f in summary.figures)):
        assert words in report.text
    for finding in summary.findings[:12]:
        assert finding.copy_words in report.text
        assert finding.score_words in report.text
    for d in summary.discrimination:
        assert f"{d.name} {d.positives} {d.negatives} {d.separation.auc.value:.3f}" in report.text


def test_reproduction_block_names_what_is_needed(labeled, report):
    folder, _ = labeled
    manifest = Run(folder).manifest
    for words in (
        manifest.command,
        f"{manifest.forwards:,}",
        "1 min 36 s",
        "torch 2.13.0",
        "weights.unet",
        "float32: no GPU found",
    ):
        assert words in report.text
    for name in ("samples.jsonl", "run.json", "thresholds.json", "controls.json"):
        assert f"SHA-256 of {name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}" in report.text
    assert str(folder.parent) not in report.html  # a report travels; the paths of the machine that made it do not


def test_a_threshold_of_another_setting_is_said_on_every_form(tmp_path):
    made = make_run(tmp_path / "run", per_group=2, seeds=2, reference=False, pictures=False)
    Run(made).update(accepted=["dtype: was 16, now 32"], git={"commit": "3f2a", "dirty": None})
    said = "made under another setting (dtype: was 16, now 32)"
    for write in (write_report, write_markdown):
        text = " ".join(write(made).read_text(encoding="utf-8").replace("\u00a0", " ").split())
        assert text.count(said) >= 2  # beside the numbers and in the reproduction block
        assert "may mean nothing here (dtype: was 16, now 32)" in text
        assert "above a threshold made under another setting" in text
        assert "3f2a, whether with changes is not known" in text
    assert said in json.loads(write_json(made).read_text(encoding="utf-8"))["headline"]


def test_what_is_unknown_is_left_out(tmp_path):
    bare = make_run(
        tmp_path / "bare", per_group=2, seeds=1, calibrated=False, pictures=False, reference=False, status="interrupted"
    )
    found = page(write_report(bare))
    assert "there is no threshold, so only their order means something" in found.text
    assert "This run is interrupted" in found.text
    assert "No reference images were given" in found.text
    assert "The highest scores" in found.text
    assert not found.all("img")
    assert "ROC" not in found.text
    assert "Git checkout" not in found.text
    assert "Copies found against" not in found.text


def test_a_run_without_any_row_is_still_a_report(tmp_path):
    from mnemoscope.records.schema import Manifest

    Run.open(tmp_path / "empty", Manifest(status="incomplete", asked=10))
    for write in (write_report, write_markdown, write_json):
        assert "Nothing could be scored" in write(tmp_path / "empty").read_text(encoding="utf-8")


# Pictures -------------------------------------------------------------------------------------------------------------


def test_pictures_are_small_webp_with_alternative_texts(report):
    images = report.all("img")
    assert len(images) == 12 * 5  # 12 prompts: the pair, and three more seeds
    for image in images:
        data = base64.b64decode(image["src"].removeprefix("data:image/webp;base64,"))
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.format == "WEBP"
            assert max(picture.size) <= 256
            assert not picture.info.get("exif")
    pairs = [image["alt"] for image in images[:2]]
    assert pairs[0].startswith("Image generated from the prompt “a ")
    assert re.fullmatch(r"Nearest reference image, \d+, pixels similarity 0\.9\d", pairs[1])
    assert all(image["alt"] for image in images)


def test_only_shown_prompts_cost_pictures(folder, tmp_path):
    assert len(page(write_report(folder, tmp_path / "a.html", shown=2)).all("img")) == 10
    assert not page(write_report(folder, tmp_path / "b.html", shown=0)).all("img")


def test_found_copies_are_blurred_until_asked_for(folder, labeled, report, tmp_path):
    veils = report.all("label", "veil")
    copied = sum(f.copies > 0 for f in labeled[1].findings[:12])
    assert len(veils) == copied > 0
    boxes = report.all("input", "reveal")
    assert len(boxes) == copied + 1  # and one for all
    assert all(box["type"] == "checkbox" for box in boxes)
    assert all(box.get("aria-label") or box.get("id") for box in boxes)
    plain = page(write_report(folder, tmp_path / "plain.html", blur=False))
    assert not plain.all("label", "veil")
    assert not plain.all("input")


def test_pictures_outside_the_run_are_not_shown(tmp_path):
    run, secret = tmp_path / "run", tmp_path / "secret.webp"
    run.mkdir()
    Image.new("RGB", (8, 8)).save(secret)
    (run / "link.webp").symlink_to(secret)
    for name in ("../secret.webp", str(secret), "link.webp"):
        found = Pictures(run).generated(Shot(0, None, name, None))
        assert (found.uri, found.why) == (None, "image lies outside the run folder")
    assert Pictures(run).generated(Shot(0, None, "a\x00b", None)).uri is None


def test_damaged_pictures_have_a_reason(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 40)  # a hole, which takes no room on the disk
    names = ("whole", "torn", "text", "bomb", "gone", "pipe", "folder", "huge")
    kept = Pictures(tmp_path)
    reasons = {n: kept.kept(f"{n}.png").why for n in names}
    assert reasons.pop("torn").startswith("image unreadable: damaged: ")
    assert reasons == {
        "whole": "",
        "text": "image unreadable: unknown: in none of the formats WEBP, PNG, JPEG",
        "bomb": "image unreadable: too large: 400,000,000 pixels; the limit is 16,777,216",
        "gone": "image missing",
        "pipe": "image unreadable: it is no regular file",
        "folder": "image unreadable: it is no regular file",
        "huge": "image unreadable: it has 1,099,511,627,776 bytes, and the limit is 67,108,864",
    }


def test_a_name_that_no_file_can_have_is_a_reason(tmp_path):
    (tmp_path / "loop.webp").symlink_to("loop.webp")
    for name in ("a\x00b", "x" * 5000, "loop.webp", ""):
        near = Nearest(reference=name, similarity=0.9, descriptor="pixels")
        assert Pictures(tmp_path).kept(name).why.startswith("image ")
        assert Pictures(tmp_path, tmp_path).reference(near).why.startswith("image ")


def test_a_picture_that_cannot_be_shown_breaks_no_page(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(module, "_webp", lambda *_: 1 / 0)
    assert Pictures(tmp_path).kept("a.png").why == "image unreadable: ZeroDivisionError"


def test_a_picture_that_many_rows_name_is_decoded_once(tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr(module, "decode", lambda *a, **k: (decoded.append(1), decode(*a, **k))[1])
    make_run(tmp_path / "run", pictures=False)
    rows = [r.model_copy(update={"image": "one.webp", "nearest": None}) for r in Run(tmp_path / "run").rows()]
    (tmp_path / "run" / "samples.jsonl").write_text("".join(r.model_dump_json(exclude_none=True) + "\n" for r in rows))
    Image.new("RGB", (8, 8)).save(tmp_path / "run" / "one.webp")
    shown = page(write_report(tmp_path / "run")).all("img")
    assert len(shown) > 4
    assert len(decoded) == len({SIDE, 128}), "once for each size"


def test_thumbnails_follow_their_file_and_are_forgotten_in_time(tmp_path, monkeypatch):
    path, kept = tmp_path / "a.png", Thumbnails()
    Image.new("RGB", (8, 8), "red").save(path)
    red = kept.of(path, SIDE, KEPT)
    assert kept.of(path, SIDE, KEPT) is red
    Image.new("RGB", (8, 9), "blue").save(path)
    assert kept.of(path, SIDE, KEPT).uri not in (None, red.uri)
    monkeypatch.setattr(module, "REMEMBERED", red.size)
    for side in range(1, 9):
        kept.of(path, side, KEPT)
    assert len(kept._kept) <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_every_kind_of_picture_has_a_thumbnail(tmp_path, mode):
    Image.new(mode, (300, 40)).save(tmp_path / "a.tiff")
    found = Thumbnails().of(tmp_path / "a.tiff", 128, COLLECTED)
    with Image.open(io.BytesIO(base64.b64decode(found.uri.partition(",")[2]))) as picture:
        assert picture.size == (128, 17)


def test_references_may_be_a_folder_or_a_mapping(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "17.png")
    near = Nearest(reference="17", similarity=0.9, descriptor="pixels")
    assert Pictures(tmp_path, tmp_path).reference(near).uri
    assert Pictures(tmp_path, {"17": tmp_path / "17.png"}).reference(near).uri
    assert Pictures(tmp_path, {}).reference(near).why == "reference image not given"
    assert Pictures(tmp_path).reference(near).why == "reference image not kept"
    away = near.model_copy(update={"reference": "../17"})
    assert Pictures(tmp_path, tmp_path / "sub").reference(away).why == "image lies outside the reference folder"


# Other forms, several runs, failures ----------------------------------------------------------------------------------


def test_markdown_keeps_its_tables_whatever_the_prompts_say(hostile):
    lines = write_markdown(hostile).read_text(encoding="utf-8").splitlines()
    columns = 0
    for line in lines:
        cells = len(re.findall(r"(?<!\\)\|", line))
        columns = (columns or cells) if line.startswith("|") else 0
        assert cells == columns, line
    text = "\n".join(lines)
    assert "<script>" not in text
    assert "://" not in text
    assert not re.search(r"^# head", text, re.MULTILINE)


def test_json_is_the_summary(folder):
    stored = json.loads(write_json(folder).read_text(encoding="utf-8"))
    assert stored == read_summary(folder).to_dict()


def test_several_runs_are_compared_on_top(folder, hostile, tmp_path):
    found = page(write_report([folder, hostile], tmp_path / "both.html", shown=1))
    assert found.text.index("Memorization audits, compared") < found.text.index("Memorization audit of demo")
    targets = [a["href"] for a in found.all("a")]
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert targets == ["#run1", "#run2"]
    assert len(ids) == len(set(ids))
    assert {"run1", "run2"} <= set(ids)
    assert len(json.loads(write_json([folder, hostile], tmp_path / "both.json").read_text(encoding="utf-8"))) == 2
    assert "Memorization audits, compared" in write_markdown([folder, hostile], tmp_path / "both.md").read_text(
        encoding="utf-8"
    )


def test_default_places(folder):
    assert write_report(folder) == folder / "report.html"
    assert write_markdown([folder]) == folder / "report.md"
    assert write_json([folder, folder]) == folder / "comparison.json"


def test_a_page_that_cannot_be_written_leaves_nothing_behind(folder, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunError, match="cannot be written"):
        write_report(folder, tmp_path / "taken", shown=0)
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_misuse_is_explained(folder):
    with pytest.raises(UsageError, match="no run to report"):
        write_report([])
    with pytest.raises(UsageError, match="shown = -1"):
        write_report(folder, shown=-1)


def test_equal_runs_give_equal_pages(folder, tmp_path):
    assert (
        write_report(folder, tmp_path / "a.html").read_bytes() == write_report(folder, tmp_path / "b.html").read_bytes()
    )


@pytest.mark.parametrize("module", ["mnemoscope.report", "mnemoscope.report.html", "mnemoscope.report.summary"])
def test_opens_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
