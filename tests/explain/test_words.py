"""Tokens become words: punctuation apart, places kept, repeated words not merged."""

from __future__ import annotations

import pytest

from mnemoscope.explain.words import Word, rest_of, without, without_markup, without_signs, words_of
from mnemoscope.models.base import Piece
from mnemoscope.models.gaussian import Gaussian

POSTER = "Emma Watson to play Belle in Disney's <i>Beauty and the Beast</i>"


def letters(prompt):
    """One piece for each character that is no space, between a start and an end."""
    inside = [Piece(c, "text", i, i + 1) for i, c in enumerate(prompt) if not c.isspace()]
    return [Piece("", "start"), *inside, Piece("", "end"), Piece("", "padding")]


def texts(prompt):
    return [w.text for w in words_of(prompt, letters(prompt))]


def test_letters_are_merged_and_signs_stand_alone():
    words = texts(POSTER)
    assert words[:7] == ["Emma", "Watson", "to", "play", "Belle", "in", "Disney's"]
    assert words[7:] == ["<", "i", ">", "Beauty", "and", "the", "Beast", "<", "/", "i", ">"]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("don’t stop", ["don’t", "stop"]),
        ("'quoted' café 007!!!", ["'", "quoted", "'", "café", "007", "!!!"]),
        ("हिन्दी 日本", ["हिन्दी", "日本"]),
        ("a-b, a", ["a", "-", "b", ",", "a"]),
        ("", []),
        (" \t", []),
    ],
)
def test_segments(prompt, words):
    assert texts(prompt) == words


def test_repeated_words_keep_their_places():
    first, second, third = words_of("red dot red", letters("red dot red"))
    assert (first.text, third.text) == ("red", "red")
    assert first.positions == (1, 2, 3)
    assert third.positions == (7, 8, 9)
    assert (third.start, third.end) == (8, 11)
    assert second.text == "dot"


def test_a_token_over_two_segments_makes_them_one_word():
    pieces = [Piece("</", "text", 1, 3), Piece("i", "text", 3, 4)]
    assert [(w.text, w.positions) for w in words_of("x</i", pieces)] == [("</", (0,)), ("i", (1,))]


def test_pieces_of_one_character_belong_to_one_word():
    pieces = [Piece("a", "text", 0, 1), Piece("b", "text", 0, 1), Piece("c", "text", 0, 1)]
    assert [w.positions for w in words_of("😀", pieces)] == [(0, 1, 2)]


def test_words_beyond_the_window_are_left_out():
    target = Gaussian(context=2)
    assert [w.text for w in words_of("one two three", target.pieces("one two three"))] == ["one", "two"]
    assert rest_of("one two three", target.pieces("one two three")).positions == ()


def test_end_and_padding_are_one():
    assert rest_of("ab", letters("ab")).positions == (3, 4)


def drop(prompt, *texts, put=""):
    words = {w.text: w for w in words_of(prompt, letters(prompt))}
    return without(prompt, [words[t] for t in texts], put)


@pytest.mark.parametrize(
    ("prompt", "dropped", "left"),
    [
        ("ringed planet, saturn and space", ["ringed"], "planet, saturn and space"),
        ("ringed planet, saturn and space", ["planet"], "ringed, saturn and space"),
        ("ringed planet, saturn and space", ["saturn", "space"], "ringed planet, and"),
        ("ringed planet, saturn and space", [","], "ringed planet saturn and space"),
        ("<i>Beauty</i>", [">"], "<i>Beauty</i"),
        ("one", ["one"], ""),
    ],
)
def test_dropping_closes_up_white_space(prompt, dropped, left):
    assert drop(prompt, *dropped) == left


def test_dropping_a_sign_does_not_glue_words_together():
    word = Word(">", 2, 3, ())
    assert without("<i>Beauty", [word]) == "<i Beauty"


def test_replacing_keeps_everything_else():
    assert drop("ringed planet, saturn", "planet", put="moon") == "ringed moon, saturn"


def test_markup_and_signs_are_taken_out():
    assert without_markup(POSTER) == "Emma Watson to play Belle in Disney's Beauty and the Beast"
    assert without_markup("2 < 3 and 4 > 3, no tags") == "2 < 3 and 4 > 3, no tags"
    assert without_signs("it's: a (very) red-hot car!") == "it's a very red hot car"
