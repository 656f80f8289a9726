"""What a visitor does, without a page: prompts, edits, the way back, links, pictures, a run folder and back."""

from __future__ import annotations

import io
import shlex
import zipfile
from types import SimpleNamespace
from urllib.parse import parse_qsl

import pytest
import torch
from desk import GUIDANCE, KNOWN, ORDINARY, STEPS, pictures_of, small_studio, small_world

from mnemoscope.audit.check import check
from mnemoscope.cli import main as cli
from mnemoscope.errors import UsageError
from mnemoscope.explain.regions import regions
from mnemoscope.records.store import Run
from mnemoscope.report.packet import pack
from mnemoscope.report.summary import read_summary
from mnemoscope.studio.model import CHOSEN_BY_HAND, Stopped
from mnemoscope.studio.session import (
    LARGEST,
    LONGEST,
    MOST_DRAWN,
    MOST_STATES,
    Link,
    Session,
    edited_from,
    read_session,
)
from mnemoscope.studio.wording import copies, pull, scale, verdict


def look(prompt: str) -> SimpleNamespace:
    return SimpleNamespace(prompt=prompt)


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    world = small_world()
    return small_studio(tmp_path_factory.mktemp("studio"), reference=pictures_of(world))


# The way through prompts --------------------------------------------------------------------------------------------------


def test_history_remembers_where_each_edit_came_from():
    session = Session()
    assert session.current is None
    first = session.add(look("a b c"))
    second = session.add(look("a b"), "drop 'c'", first.number)
    third = session.add(look("a"), "drop 'b'", second.number)
    assert session.current is third
    assert session.first is first
    session.show(first.number)
    assert session.current is first
    assert session.first is None
    session.show(99)
    assert session.current is first
    assert [s.group for s in session.states] == ["1. as typed", "2. drop 'c'", "3. drop 'b'"]


def test_the_same_prompt_twice_in_a_row_is_one_look():
    session = Session()
    assert session.add(look("a")) is session.add(look("a"))
    assert len(session.states) == 1


def test_undo_goes_back_to_what_was_edited():
    session = Session()
    first = session.add(look("a b"))
    session.add(look("other"))
    session.show(first.number)
    session.add(look("a"), "drop 'b'", first.number)
    session.undo()
    assert session.current is first
    assert [s.prompt for s in session.states] == ["a b", "other"]
    session.show(2)
    session.undo()
    session.undo()  # the last one stays
    assert [s.prompt for s in session.states] == ["a b"]
    assert session.current is first


def test_undo_of_the_oldest_shows_the_next():
    session = Session()
    session.add(look("a"))
    second = session.add(look("b"))
    session.show(1)
    session.undo()
    assert session.current is second


def test_a_session_takes_no_more_memory_however_long_it_is():
    session = Session()
    for i in range(3 * MOST_STATES):
        state = session.add(look(f"prompt {i}"), origin=session.at or None)
        session.draw(state.number, f"pictures {i}")
    assert len(session.states) == MOST_STATES
    drawn = [s.number for s in session.states if s.drawn is not None]
    assert len(drawn) == MOST_DRAWN
    assert drawn[-1] == session.at == 3 * MOST_STATES
    assert session.first is session.states[0]  # the one it began with is forgotten


def test_pictures_that_are_shown_are_kept():
    session = Session()
    session.add(look("the first"))
    session.draw(1, "pictures")
    for i in range(2 * MOST_DRAWN):
        session.draw(session.add(look(f"prompt {i}"), "edited", 1).number, "pictures")
    assert session.first is not None
    assert session.first.drawn == "pictures"
    assert session.current is not None
    assert session.current.drawn == "pictures"


# Links --------------------------------------------------------------------------------------------------------------------

SETTINGS = {"seeds": 4, "steps": 50, "guidance": 7.5}


@pytest.mark.parametrize(
    "prompt", ["a cat", "", "100 % & more=yes?#", "Größe 猫 \u202e", '<script>"&amp;</script>', "a\nb"]
)
def test_a_link_leads_back_to_prompt_edit_and_settings(prompt):
    session = Session()
    session.add(look(prompt))
    query = Link.of(session, SETTINGS).query
    back = Link.parse(dict(parse_qsl(query[1:], keep_blank_values=True)), SETTINGS)
    assert (back.prompt, back.edited) == (prompt, None)
    assert back.differs(SETTINGS) == []
    session.add(look(prompt + " edited"), "replace", 1)
    back = Link.parse(dict(parse_qsl(Link.of(session, SETTINGS).query[1:], keep_blank_values=True)), SETTINGS)
    assert (back.prompt, back.edited) == (prompt, prompt + " edited")


def test_a_link_says_what_is_other_here():
    made = Link.parse({"prompt": "a", "seeds": "8", "guidance": "7.5", "unknown": "1"}, SETTINGS)
    assert made.differs(SETTINGS) == ["seeds 8, here 4"]


@pytest.mark.parametrize(
    "query", [{}, {"edited": "a"}, {"prompt": "a" * (LONGEST + 1)}, {"prompt": "a", "edited": "b" * 3000}]
)
def test_an_address_that_says_nothing(query):
    assert Link.parse(query, SETTINGS).prompt is None
    assert Link.of(Session(), SETTINGS).query == ""


# What the model is asked --------------------------------------------------------------------------------------------------


def test_the_score_is_that_of_a_check(studio):
    seen = studio.look([KNOWN])[0]
    held = check(small_world(), KNOWN, seeds=3, steps=STEPS, guidance=GUIDANCE, calibration=studio.calibration)
    assert seen.score == pytest.approx(held.score, rel=1e-12)
    assert (seen.p, seen.threshold, seen.above) == (held.p, held.threshold, True)


def test_a_change_brings_the_score_that_was_announced(studio):
    seen = studio.look([KNOWN])[0]
    for word in seen.words:
        [edit] = studio.changes(seen, word)  # this world knows no vocabulary
        assert edit.kind == "drop"
        assert edit.score == pytest.approx(studio.look([edit.prompt])[0].score, rel=1e-12)


def test_near_words_are_offered_where_the_model_knows_some(studio, monkeypatch):
    asked = []

    def neighbors(self, words, k, among=None):
        asked.append((words, k))
        return [["a cat"][:k] for _ in words]

    monkeypatch.setattr(type(studio.target), "neighbors", neighbors, raising=False)
    seen = studio.look([KNOWN])[0]
    edits = studio.changes(seen, seen.words[1])
    assert asked == [(["mona"], 3)]
    assert [e.prompt for e in edits] == ["the lisa", "the a cat lisa"]


def test_a_suggestion_comes_under_the_threshold(studio):
    seen = studio.look([KNOWN])[0]
    found = studio.suggest(seen)
    assert found.under
    assert studio.look([found.text])[0].above is False


def test_long_prompts_are_refused(studio):
    with pytest.raises(UsageError, match=f"2,001 characters; give one of at most {LONGEST:,}"):
        studio.look(["x" * (LONGEST + 1)])


def test_a_calibration_of_another_setting_is_refused_before_anybody_visits(studio, tmp_path):
    other = studio.config.model_copy(update={"steps": STEPS + 1})
    with pytest.raises(UsageError, match="steps: was 5, now 6"):
        type(studio)(studio.target, other, studio.calibration)


# Pictures -----------------------------------------------------------------------------------------------------------------


def test_pictures_are_those_of_a_check_and_maps_those_of_regions(studio):
    told = []
    drawn = studio.draw(KNOWN, lambda done, asked: told.append((done, asked)))
    assert told == [(i, STEPS) for i in range(1, STEPS + 1)]
    apart = regions(small_world(), KNOWN, "score", seeds=3, steps=STEPS, guidance=GUIDANCE)
    torch.testing.assert_close(drawn.maps, apart.maps)
    assert [shot.seed for shot in drawn.shots] == [0, 1, 2]
    held = check(small_world(), KNOWN, seeds=3, steps=STEPS, guidance=GUIDANCE, reference=studio.reference)
    assert [s.nearest.similarity for s in drawn.shots] == pytest.approx([m.similarity for m in held.nearest], abs=1e-6)
    assert drawn.copies == 3
    assert set(drawn.references) == {"picture 0"}
    assert drawn.overlay.alt.startswith("Generated pictures of 'the mona lisa'")
    assert copies(drawn) == "Copy found in 3 of 3 seeds."


def test_many_seeds_are_drawn_a_few_at_a_time(studio):
    few = type(studio)(studio.target, studio.config, studio.calibration, studio.reference)
    few.explainer.batch_size = 2
    told = []
    drawn = few.draw("a cat", lambda done, asked: told.append((done, asked)))
    assert told[-1] == (2 * STEPS, 2 * STEPS)
    assert [s.picture for s in drawn.shots] == [s.picture for s in studio.draw("a cat").shots]


def test_drawing_can_be_stopped(studio):
    def tell(done: int, asked: int) -> None:
        if done == 2:
            raise Stopped

    before = studio.target.forwards
    with pytest.raises(Stopped):
        studio.draw(KNOWN, tell)
    assert (
        studio.target.forwards - before == 3 + 6
    )  # n at the first step, whose null prediction is known, and 2 n at the second
    assert studio.draw(KNOWN).copies == 3


def test_without_references_nothing_is_called_a_copy(tmp_path):
    alone = small_studio(tmp_path, calibrated=False)
    drawn = alone.draw("a cat")
    assert drawn.copies == 0
    assert not drawn.compared
    assert "not tested" in copies(drawn)


# Words --------------------------------------------------------------------------------------------------------------------


def test_what_a_score_means_in_words(studio):
    told = verdict(studio.look([KNOWN])[0], studio.calibration, "small")
    assert told.tone == "above"
    assert (
        "None of 40 ordinary prompts scored as high (p = 0.024). On their own, 3 of 3 random starts (seeds) are above it."
        in (told.sentences[0])
    )
    calm = verdict(studio.look([ORDINARY[3]])[0], studio.calibration, "small")
    assert calm.tone == "under"
    assert "no proof" in calm.sentences[-1]
    assert not any("memorized" in s.lower() for t in (told, calm) for s in (t.headline, *t.sentences))


def test_without_a_threshold_no_score_is_high(tmp_path):
    alone = small_studio(tmp_path, calibrated=False)
    told = verdict(alone.look([KNOWN])[0], None, "small")
    assert told.tone == "open"
    assert "mnemoscope calibrate small --prompts ordinary.txt" in told.sentences[1]
    with pytest.raises(UsageError, match="calibrate the model"):
        alone.suggest(alone.look([KNOWN])[0])


def test_parts_of_the_pull_sum_to_one(studio):
    seen = studio.look([KNOWN])[0]
    shares = pull(seen)
    assert [w.text for w, _ in shares] == ["the", "mona", "lisa"]
    assert sum(share for _, share in shares) == pytest.approx(1)
    assert all(share >= 0 for _, share in shares)
    assert pull(studio.look([""])[0]) == []


def test_the_line_holds_every_score(studio):
    seen, other = studio.look([KNOWN, "a cat"])
    line = scale(seen, other, studio.calibration)
    places = [line.limit, line.here, line.before, *(x for x, _ in line.outline)]
    assert all(p is not None and 0 <= p <= 1 for p in places)
    assert line.before < line.limit < line.here
    assert max(h for _, h in line.outline) == 1


# A run folder, and back ---------------------------------------------------------------------------------------------------


def visited(studio) -> Session:
    session = Session()
    first = session.add(studio.look([KNOWN])[0])
    session.add(studio.look(["the lisa"])[0], "drop 'mona'", first.number)
    return session


def test_an_exported_session_is_a_run(studio):
    session = visited(studio)
    session.draw(1, studio.draw(KNOWN))
    told = []
    run = studio.export(session.states, lambda done, asked: told.append((done, asked)))
    assert told[-1] == (6, 6)
    assert run.manifest.status == "done"
    summary = read_summary(run.folder)
    assert [f.prompt for f in summary.findings] == [KNOWN, "the lisa"]
    for finding, state in zip(summary.findings, session.states, strict=True):
        assert finding.score == pytest.approx(state.look.score, rel=1e-9)
        assert finding.p == state.look.p
    assert [f.copies for f in summary.findings] == [3, 0]
    assert {g.name for g in summary.groups} >= {"1. as typed", "2. drop 'mona'"}
    assert CHOSEN_BY_HAND in run.manifest.notes
    again = studio.export(session.states)
    assert again.folder != run.folder


def test_an_exported_session_is_read_back(studio, tmp_path):
    run = studio.export(visited(studio).states)
    assert not run.manifest.config["images"]  # nothing was drawn
    rows = (run.folder / "samples.jsonl").read_bytes()
    prompts = read_session("samples.jsonl", rows)
    assert prompts == [(KNOWN, "as typed"), ("the lisa", "drop 'mona'")]
    assert edited_from(prompts) == [None, 0]
    packed = pack([run.folder], tmp_path / "session.zip")
    assert read_session("session.zip", packed.path.read_bytes()) == prompts


def test_a_stopped_export_is_an_interrupted_run(studio):
    def tell(done: int, asked: int) -> None:
        raise Stopped

    with pytest.raises(Stopped, match=r"\d of 6 samples are saved"):
        studio.export(visited(studio).states, tell)
    newest = max(studio.out.iterdir(), key=lambda p: p.stat().st_mtime_ns)
    assert Run(newest).manifest.status == "interrupted"


def test_nothing_is_exported_from_nothing(studio):
    with pytest.raises(UsageError, match="score a prompt first"):
        studio.export([])


def test_the_command_of_an_exported_session_is_one(studio):
    run = studio.export(visited(studio).states)
    words = shlex.split(run.manifest.command)
    assert words[:3] == ["mnemoscope", "audit", "small"]
    assert words[words.index("--prompts") + 1] == str(run.folder / "prompts.jsonl")
    assert (run.folder / "prompts.jsonl").is_file()
    known = {option for p in _audit_options() for option in p.opts}
    assert {w for w in words if w.startswith("--")} <= known


def _audit_options():
    import typer

    return typer.main.get_command(cli.app).commands["audit"].params


def zipped(**contents: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name.replace("_", "."), data)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("picture.png", b"x", "neither a samples.jsonl nor a packet"),
        ("rows.jsonl", b"", "holds no prompt"),
        ("rows.jsonl", b'{"prompt": "a"}\n', "holds a line that is no sample"),
        ("rows.jsonl", b"\xff\xfe", "holds a line that is no sample"),
        ("rows.jsonl", b" " * (LARGEST + 1), "more than 8 MB"),
        ("packet.zip", b"PK", "no packet of a session"),
        ("packet.zip", zipped(other_txt=b""), "no packet of a session"),
        ("packet.zip", zipped(samples_jsonl=b" " * (LARGEST + 1)), "unpacks to more than 8 MB"),
    ],
)
def test_other_files_are_refused_in_one_sentence(name, data, sentence):
    with pytest.raises(UsageError, match=sentence) as error:
        read_session(name, data)
    assert "\n" not in str(error.value)
