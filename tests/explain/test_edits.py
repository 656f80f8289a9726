"""Edits are found greedily, cheapest first, and say what they did."""

from __future__ import annotations

import json

import pytest
import torch

from mnemoscope.errors import UsageError
from mnemoscope.explain.edits import Edit, Suggestion, suggest
from mnemoscope.explain.tokens import Explainer
from mnemoscope.models.gaussian import Gaussian


@pytest.fixture
def world():
    """A memorized prompt; whatever is left of it after an edit is ordinary."""
    return Gaussian.world(["a cat"], ["the mona lisa"], dtype=torch.float64)


class Spy(Explainer):
    """Remembers which prompts were scored."""

    def scores(self, prompts):
        self.asked = [*getattr(self, "asked", []), *prompts]
        return super().scores(prompts)


def explained(target, prompt, method="edit", **options):
    run = Spy(target, **{"seeds": 2, **options})
    return run, run.explain([prompt], method)[0]


def test_the_first_word_that_does_ends_the_search(world):
    run, found = explained(world, "the mona lisa")
    suggested = suggest(run, found, found.score * 0.9)
    word = found.ranked[0].text
    assert [e.old for e in suggested.edits] == [word]
    assert suggested.under
    assert suggested.after < suggested.before == found.score
    assert len(run.asked) == 1
    assert suggested.forwards == 2  # one candidate, two seeds
    assert suggested.words.startswith(f"drop {word!r}: score {found.score:.3f} → {suggested.after:.3f}, not above")


def test_scores_after_are_the_scores_of_the_edited_prompt(world):
    run, found = explained(world, "the mona lisa")
    suggested = suggest(run, found, found.score * 0.9)
    assert suggested.after == pytest.approx(float(run.scores([suggested.text]).mean()), rel=1e-12)
    assert "mona lisa" not in suggested.text or "the" not in suggested.text


def test_nothing_is_done_where_nothing_is_needed(world):
    run, found = explained(world, "a cat")
    suggested = suggest(run, found, found.score)
    assert suggested.edits == ()
    assert suggested.under
    assert suggested.forwards == 0
    assert "nothing to edit" in suggested.words
    assert suggested.text == "a cat"


def test_what_cannot_be_reached_is_said(world):
    run, found = explained(world, "the mona lisa")
    suggested = suggest(run, found, 0.0, most_edits=2)
    assert not suggested.under
    assert 1 <= len(suggested.edits) <= 2
    assert "still above" in suggested.words
    assert suggested.alternatives == ()
    scores = [suggested.before, *(e.score for e in suggested.edits)]
    assert scores == sorted(scores, reverse=True)


def test_signs_are_taken_out_before_words(world):
    run, found = explained(world, "<i>the</i> mona lisa")
    suggest(run, found, 0.0, most_edits=1)
    assert run.asked[0] == "the mona lisa"  # without markup it is the memorized prompt itself
    assert len(run.asked) > 1


def test_replacements_come_from_the_vocabulary(target_of):
    run, found = explained(target_of("sd"), "a red dog", "leave-one-out")
    suggested = suggest(run, found, 0.0, most_edits=1, most_words=1, neighbors=2, among=["cat", "dot", "red", "dog"])
    word = found.ranked[0].text
    assert len(run.asked) == 3
    assert all(word not in p.split() for p in run.asked)
    assert {w for p in run.asked for w in p.split()} <= {"a", "red", "dog", "cat", "dot"}
    assert suggested.forwards == 2 * 3


def test_words_that_may_be_tried_are_bounded(world):
    run, found = explained(world, "the mona lisa")
    suggest(run, found, 0.0, most_edits=1, most_words=1)
    assert len(run.asked) == 1


def test_the_smallest_of_several_edits_is_kept():
    from mnemoscope.explain.edits import _least

    drop, replace = Edit("drop", "a", "", "b", 0.1), Edit("replace", "a", "c", "c b", 0.5)
    signs = Edit("signs", "punctuation", "", "a b", 0.9)
    assert _least([drop, replace]) is replace
    assert _least([drop, replace, signs]) is signs
    assert _least([]) is None


def test_a_threshold_is_needed(world):
    run, found = explained(world, "a cat")
    with pytest.raises(UsageError, match="needs a threshold"):
        suggest(run, found)


def test_a_suggestion_is_plain_values():
    edit = Edit("replace", "<red>", "blue", "a blue dog", 0.5)
    suggested = Suggestion("a <red> dog", (edit,), 2.0, 1.0, (), 8)
    assert json.loads(json.dumps(suggested.to_dict()))["edits"][0]["new"] == "blue"
    assert edit.words == "replace '<red>' by 'blue'"
    assert "&lt;red&gt;" in suggested._repr_html_()
