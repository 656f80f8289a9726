"""The numbers of the first screen, counted by hand on small sets of rows."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import pytest
from scipy.stats import beta
from synthetic_run import make_run

from mnemoscope import stats
from mnemoscope.errors import RunError, UnknownName, UsageError
from mnemoscope.records.schema import Manifest, Nearest, Row, Score, Thresholds
from mnemoscope.records.store import Run
from mnemoscope.report.discrimination import Baseline
from mnemoscope.report.findings import Share
from mnemoscope.report.summary import read_summary, summarize


def row(prompt, seed, score=None, *, similarity=None, threshold=0.9, steps=(), **facts):
    nearest = None
    if similarity is not None:
        found = None if threshold is None else similarity > threshold
        nearest = Nearest(
            reference="17", similarity=similarity, descriptor="pixels", threshold=threshold, copy_found=found
        )
    scores = {} if score is None else {"magnitude": Score(value=score, space="eps", per_step=list(steps))}
    facts = {"status": "ok", "scores": scores, "nearest": nearest} | facts
    return Row(id=f"{prompt}/{seed}", prompt_id=prompt, prompt=f"text of {prompt}", seed=seed, **facts)


def thresholds(seeds=2, **changes):
    """99 ordinary scores 0.00 … 0.98; at 1 % the threshold is the largest."""
    facts = {
        "detector": "magnitude",
        "setting": {"seeds": seeds},
        "scores": [i / 100 for i in range(99)],
        "fpr": 0.01,
        "threshold": 0.98,
        "interval": (0.9, None),
        "source": "99 prompts",
    }
    return Thresholds(**(facts | changes))


DONE = Manifest(status="done", asked=8)

FOUR = [
    # flagged and copied in both seeds; flagged only; copied in one seed only; nothing
    *(row("both", s, 3.0 + s, similarity=0.95 - 0.02 * s) for s in (0, 1)),
    *(row("flagged", s, 9.0, similarity=0.3) for s in (0, 1)),
    *(row("copied", s, 0.2, similarity=0.5 + 0.45 * s) for s in (0, 1)),
    *(row("clean", s, 0.5, similarity=0.4) for s in (0, 1)),
]


@pytest.fixture
def four():
    return summarize(FOUR, DONE, thresholds())


# Counts ---------------------------------------------------------------------------------------------------------------


def test_the_three_numbers(four):
    assert [(f.share.k, f.share.n) for f in four.figures] == [(2, 4), (2, 4), (1, 4)]
    assert four.copies_in(1) == 2
    assert four.copies_in(2) == 1


def test_scores_are_means_over_seeds_and_p_values_count_ordinary_scores(four):
    found = {f.prompt_id: f for f in four.findings}
    assert found["both"].score == 3.5
    assert found["both"].p == 1 / 100
    assert found["clean"].p == (1 + 49) / 100  # 0.50 … 0.98 are at least as large
    assert found["copied"].p == (1 + 79) / 100


def test_adjusted_p_values_are_benjamini_and_hochbergs(four):
    q = {f.prompt_id: f.q for f in four.findings}
    assert q["both"] == q["flagged"] == pytest.approx(0.01 * 4 / 2)
    assert q["clean"] == pytest.approx(0.5 * 4 / 3)
    assert four.significant == 2


def test_the_threshold_itself_is_not_above():
    summary = summarize([row("on", 0, 0.98), row("over", 0, 0.981)], DONE, thresholds(seeds=1))
    assert {f.prompt_id: f.above for f in summary.findings} == {"on": False, "over": True}
    # p = (1 + #{ordinary ≥ score}) / (1 + N): on the threshold it is above the stated rate, beyond it is not.
    assert {f.prompt_id: f.p for f in summary.findings} == {"on": 2 / 100, "over": 1 / 100}
    assert "exceeds 0.98" in summary.figures[0].meaning


def test_worst_come_first_copies_before_scores(four):
    assert [f.prompt_id for f in four.findings] == ["both", "copied", "flagged", "clean"]


def test_the_nearest_seed_is_shown_first(four):
    shots = {f.prompt_id: [s.seed for s in f.shots] for f in four.findings}
    assert shots["both"] == [0, 1]
    assert shots["copied"] == [1, 0]


def test_steps_are_means_over_seeds():
    rows = [row("a", 0, 1.0, steps=[1.0, 2.0, 3.0]), row("a", 1, 1.0, steps=[3.0, 6.0])]
    assert summarize(rows, DONE).findings[0].steps.tolist() == [2.0, 4.0]


@pytest.mark.parametrize(("k", "n"), [(0, 12), (3, 12), (12, 12), (1, 299)])
def test_shares_are_bounded_exactly(k, n):
    share = Share.of(k, n)
    assert share.low == pytest.approx(beta.ppf(0.025, k, n - k + 1) if k else 0.0)
    assert share.high == pytest.approx(beta.ppf(0.975, k + 1, n - k) if k < n else 1.0)
    assert share.upper == pytest.approx(beta.ppf(0.95, k + 1, n - k) if k < n else 1.0)


def test_nothing_found_is_said_with_the_bound():
    assert Share.of(0, 12).words == "none found among 12 (95 % upper bound 22 %)"
    assert Share.of(3, 12).words == "3 of 12 (25 %, 95 % interval 5.5–57 %)"
    assert Share.of(0, 0).words == "not tested"
    assert Share.of(0, 299).bounds == "95 % upper bound 1 %"


# Words ----------------------------------------------------------------------------------------------------------------


def test_findings_speak_the_projects_words(four):
    both, copied, flagged, clean = four.findings
    assert both.score_words == "above threshold at 1 % FPR (p = 0.01)"
    assert both.copy_words == "copy found (pixels 0.95, reference #17) in 2 of 2 seeds"
    assert copied.copy_words == "copy found (pixels 0.95, reference #17) in 1 of 2 seeds"
    assert flagged.copy_words == "no copy found in 2 of 2 seeds (nearest pixels 0.30, reference #17)"
    assert clean.score_words == "not above threshold at 1 % FPR (p = 0.5)"


ON2, ON1 = "on 2 seeds each", "on 1 seed each"
ABOVE = "above the threshold for 1 % false positives"
HEADLINES = [
    (FOUR, thresholds(), f"A copy of a reference image was found for 2 of 4 prompts (95 % interval 6.8–93 %), {ON2}."),
    (FOUR[2:4] + FOUR[6:], None, f"No copy of a reference image was found among 2 prompts, {ON2} (95 % upper bound 78 %)."),
    ([row("a", 0, 2.0), row("b", 0, 0.1)], thresholds(1), f"1 of 2 prompts scores {ABOVE} (95 % interval 1.3–99 %), {ON1}."),
    ([row("a", 0, 0.1)], thresholds(1), f"None of 1 prompt scores {ABOVE} (95 % upper bound 95 %), {ON1}."),
    ([row("a", 0, 2.0)], None, f"1 prompt was scored, {ON1}; there is no threshold, so only their order means something."),
    ([row("a", 0, status="error", error="x")], None, "Nothing could be scored or compared, for 1 prompt."),
    ([], None, "Nothing could be scored or compared, for 0 prompts."),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "calibration", "sentence"), HEADLINES)
def test_headlines(rows, calibration, sentence):
    assert summarize(rows, DONE, calibration).headline == sentence


@pytest.mark.parametrize(("rows", "calibration", "_sentence"), HEADLINES)
def test_no_prompt_is_ever_called_memorized(rows, calibration, _sentence):
    summary = summarize(rows, DONE, calibration)
    said = [
        str(summary),
        summary.subline,
        *summary.untested,
        *(f.meaning + f.detail + f.words for f in summary.figures),
    ]
    said += [words for f in summary.findings for words in (f.score_words, f.copy_words)]
    assert not re.search("memori[sz]", " ".join(said), re.IGNORECASE)


def test_without_a_threshold_no_prompt_is_above_one():
    summary = summarize(FOUR, DONE)
    assert summary.above is None
    assert summary.figures[0].words == "not tested"
    assert {f.above for f in summary.findings} == {None}
    assert summary.findings[0].score_words == "score only, not calibrated"
    assert any("not calibrated" in note for note in summary.untested)


# What was not tested --------------------------------------------------------------------------------------------------


def test_prompts_with_too_few_seeds_are_not_judged():
    rows = [*FOUR, row("lost", 0, 5.0, similarity=0.1), row("lost", 1, status="error", error="ModelFault: NaN")]
    summary = summarize(rows, DONE, thresholds())
    lost = next(f for f in summary.findings if f.prompt_id == "lost")
    assert (lost.score, lost.above, lost.p, lost.failed) == (5.0, None, None, 1)
    assert summary.above.n == 4
    assert summary.copies.n == 5
    assert "1 of 10 samples failed." in summary.untested
    assert any(note.startswith("1 prompt has other than the 2 seeds") for note in summary.untested)


def test_scores_within_rounding_of_the_threshold_are_borderline():
    near, far = row("near", 0, 0.98 * (1 + 1e-4)), row("far", 0, 0.99)
    summary = summarize([near, far], DONE.model_copy(update={"target": {"dtype": "float32"}}), thresholds(1))
    assert {f.prompt_id: f.borderline for f in summary.findings} == {"near": True, "far": False}
    assert (
        "1 prompt is borderline, within rounding (0.03 %) of the threshold: another machine may call it differently."
        in (summary.untested)
    )
    assert summary.to_dict()["threshold"]["rounding"] == pytest.approx(2**-11.5)
    # The coarser of the run's and the calibration's.
    stored = summarize([near, far], DONE, thresholds(1, rounding=0.02))
    assert all(f.borderline for f in stored.findings)
    half = summarize([near, far], DONE.model_copy(update={"target": {"dtype": "torch.float16"}}), thresholds(1))
    assert all(f.borderline for f in half.findings)


SHORT = [row(p, s, v + s / 2) for p, v in (("high", 9.0), ("low", 0.25)) for s in (0, 1)]
SEEDS = "seeds: was 4, now 2"


def accepted(*differences, **config):
    return DONE.model_copy(update={"asked": 4, "accepted": list(differences), "config": {"seeds": 2} | config})


def test_a_threshold_accepted_across_settings_says_so_wherever_it_speaks():
    summary = summarize(SHORT, accepted(SEEDS), thresholds(4))
    assert (summary.above.k, summary.above.n, summary.seeds) == (1, 2, 2)
    assert summary.headline == (
        "1 of 2 prompts scores above the threshold for 1 % false positives (95 % interval 1.3–99 %), on 2 seeds each; "
        f"the threshold was made under another setting ({SEEDS})."
    )
    high, low = summary.findings
    assert high.score_words == "above a threshold made under another setting, where it means 1 % FPR (p = 0.01)"
    assert low.score_words == "not above a threshold made under another setting, where it means 1 % FPR (p = 0.5)"
    assert summary.untested[0] == (
        f"The threshold was made under another setting and may mean nothing here ({SEEDS}): its false-positive rate and the "
        "p-values hold there."
    )
    assert f"under another setting ({SEEDS}); how many do here is not known" in summary.figures[0].meaning
    # What presumes the rate is not claimed.
    assert (summary.significant, summary.figures[0].detail) == (None, "")
    assert not any("true false-positive rate" in note for note in summary.untested)
    assert summary.to_dict()["threshold"]["differences"] == [SEEDS]
    copied = summarize(
        [*SHORT, row("c", 0, similarity=0.95), row("c", 1, similarity=0.95)], accepted(SEEDS), thresholds(4)
    )
    assert copied.subline.endswith(f"; the threshold was made under another setting ({SEEDS}).")
    assert "by chance" not in copied.subline


def test_many_differences_are_counted_in_the_sentence_and_listed_below():
    many = [f"target.{k}: was 1, now 2" for k in "abcde"]
    summary = summarize(SHORT, accepted(*many), thresholds(2))
    assert f"({'; '.join(many[:3])}; 2 more)" in summary.headline
    assert any("; ".join(many) in note for note in summary.untested)


def test_a_threshold_of_another_number_of_seeds_judges_nobody_unless_accepted():
    summary = summarize(SHORT, DONE, thresholds(4))
    assert summary.above is None
    assert (
        summary.headline
        == "2 prompts were scored, on 2 seeds each; the threshold could judge none, so only their order means something."
    )
    assert summary.findings[0].score_words == "not judged: that takes another number of seeds than 2"
    assert "2 prompts have other than the 4 seeds that it takes to be judged, and were not judged." in summary.untested


def test_a_threshold_that_came_by_hand_is_seen_through():
    method = {"name": "magnitude", "class": "Magnitude", "options": {"variant": "a"}}
    own = {**method, "options": {"variant": "b", "window": [0, 1]}}
    setting = {"guidance": 7.5, "base_seed": 1, "detectors": {"magnitude": own}}
    manifest = DONE.model_copy(update={"setting": setting, "config": {"seeds": 2}})
    made = {"seeds": 2, "guidance": 3.0, "base_seed": None, "window": [0, 5], "method": method, "steps": 50}
    assert summarize(SHORT, manifest, thresholds(setting=made)).foreign == [
        "guidance: was 3.0, now 7.5",
        'method.options.variant: was "a", now "b"',
        "window: was [0, 5], now [0, 1]",
    ]
    made |= {"guidance": 7.5, "window": [0, 1], "method": {**method, "options": {"variant": "b"}}}
    assert summarize(SHORT, manifest, thresholds(setting=made)).foreign == []


def test_the_size_of_the_reference_set_is_said(four):
    assert "A copy of an image outside the reference set cannot be found." in four.untested
    assert "Verbatim copies and copies of a template were not told apart." in four.untested
    reference = {"name": "pixels-16", "pictures": 1200, "threshold": 0.9}
    summary = summarize(FOUR[6:], DONE.model_copy(update={"asked": 2, "config": {"reference": reference}}))
    assert summary.untested[1] == (
        "Copies were looked for among 1,200 reference images. A copy of an image outside the reference set cannot be found."
    )


def test_a_similarity_without_threshold_is_no_copy():
    summary = summarize([row("a", 0, 1.0, similarity=0.99, threshold=None)], DONE)
    assert summary.copies is None
    assert summary.findings[0].copy_words == "nearest pixels 0.99, reference #17; not calibrated, so no copy is called"
    assert any("descriptor is not calibrated" in note for note in summary.untested)


def test_gaps_are_listed():
    rows = [row("a", 0, 1.0, tokens_dropped=3)]
    manifest = Manifest(status="interrupted", asked=40, notes=["Adversarial prompts were not tried."])
    notes = summarize(rows, manifest).untested
    assert notes[0] == "The run is interrupted: 1 of 40 samples are there."
    assert any(note.startswith("1 prompt has more tokens") for note in notes)
    assert any("No reference images" in note for note in notes)
    assert notes[-1] == "Adversarial prompts were not tried."


def test_thresholds_of_another_score_are_not_used():
    summary = summarize(FOUR, DONE, thresholds(detector="sharpness"))
    assert summary.thresholds is None
    assert summary.detector == "magnitude"
    assert summary.untested[0].startswith("The thresholds belong to sharpness")


def test_misuse_is_explained():
    with pytest.raises(UsageError, match="twice"):
        summarize(iter(FOUR), DONE)
    with pytest.raises(UnknownName, match="Did you mean 'magnitude'"):
        summarize(FOUR, DONE, detector="magnitud")


# Groups and labels ----------------------------------------------------------------------------------------------------


def test_groups_are_counted_one_by_one():
    rows = [row("a", 0, 3.0, similarity=0.95, group="planted"), row("b", 0, 0.1, similarity=0.1, group="planted")]
    rows += [row("c", 0, 0.2, group="ordinary")]
    manifest = DONE.model_copy(update={"doses": {"planted": 8}})
    planted, ordinary = summarize(rows, manifest, thresholds(1)).groups
    assert (planted.name, planted.prompts, planted.dose, planted.median) == ("planted", 2, 8, pytest.approx(1.55))
    assert (planted.above.k, planted.above.n, planted.copies.k, planted.copies.n) == (1, 2, 1, 2)
    assert (ordinary.dose, ordinary.copies, ordinary.above.k) == (None, None, 0)


def test_no_groups_no_table(four):
    assert four.groups == []


def labeled(n=8):
    rows = [row(f"m{i}", 0, 2.0 + i, label=True) for i in range(n)]
    return rows + [row(f"o{i}", 0, 1.0 + i / 3, label=False) for i in range(n)]


def test_separation_is_the_one_of_stats():
    (found,) = summarize(labeled(), DONE).discrimination
    scores, labels = [f.scores["magnitude"].value for f in labeled()], [f.label for f in labeled()]
    assert found.separation == stats.separation(scores, labels)
    assert (found.positives, found.negatives) == (8, 8)


def test_text_only_baseline_stands_beside_it(tmp_path):
    from mnemoscope.audit.controls import text_baseline

    rows = labeled()
    made = text_baseline([r.prompt for r in rows], [bool(r.label) for r in rows], clusters=range(16), resamples=20)
    stored = json.dumps(asdict(made) | {"prompts": [r.prompt for r in rows]}).encode()
    summary = summarize(rows, DONE, None, Baseline.parse(stored))
    assert [d.name for d in summary.discrimination] == [
        "magnitude",
        "text only: character n-grams",
        "text only: capitals and digits",
    ]
    assert summary.discrimination[1].separation == made.ngrams
    assert summary.discrimination[1].roc.tpr[-1] == 1.0
    assert summary.discrimination[2].roc is None


def test_a_baseline_of_other_prompts_is_not_shown():
    summary = summarize(labeled(), DONE, None, Baseline(["else"], [0.1], [0], {}))
    assert len(summary.discrimination) == 1
    assert any("other prompts" in note for note in summary.untested)


def test_labels_of_one_kind_are_explained():
    summary = summarize([row("a", 0, 1.0, label=True)], DONE)
    assert summary.discrimination == []
    assert any("known label was not computed" in note for note in summary.untested)


# The run folder, and JSON ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "demo-1", per_group=4, pictures=False)


def test_a_folder_gives_what_its_rows_give(folder):
    run = Run(folder)
    stored = Thresholds.model_validate_json((folder / "thresholds.json").read_bytes())
    direct = summarize(list(run.rows()), run.manifest, stored, name="demo-1")
    assert read_summary(folder).to_dict() == direct.to_dict()


def test_the_dictionary_is_json(folder, four):
    for summary in (read_summary(folder), four, summarize([], DONE), summarize(labeled(), DONE)):
        plain = summary.to_dict()
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
        assert plain["headline"] == str(summary)
        assert plain["not_tested"] == summary.untested


def test_json_and_words_agree(four):
    plain = four.to_dict()
    assert plain["copy_found"] == asdict(four.copies) | {"words": four.figures[1].words}
    assert plain["copies_in_at_least"] == {"1": 2, "2": 1}
    assert plain["threshold"]["ordinary_prompts"] == 99
    assert plain["threshold"]["interval"] == [0.9, None]
    assert [f["prompt_id"] for f in plain["worst"]] == ["both", "copied", "flagged", "clean"]


UNEVEN = b'{"prompts": ["a"], "scores": [], "clusters": [0, 1], "ngrams": null, "capitals": null, "reason": ""}'


@pytest.mark.parametrize("name", ["thresholds.json", "controls.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"scores": 3}', b"null", b"\xff", UNEVEN])
def test_damaged_files_are_named(folder, tmp_path, name, content):
    (tmp_path / "run.json").write_bytes((folder / "run.json").read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=name):
        read_summary(tmp_path)


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        read_summary(tmp_path)
