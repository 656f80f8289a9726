"""What each position of an encoded prompt stands for, with fast tokenizers and without, and which words lie close by."""

from __future__ import annotations

import pytest
import torch

from mnemoscope.models.base import Piece, Target
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.models.spelling import look_up, neighbors, spell, unspell

PROMPTS = ["a red cat, a dog", "Three <i>Dots</i>!!", "naïve 😀 café", "", "x" * 400]


class Slow:
    """A tokenizer that keeps no offsets."""

    is_fast = False

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, text, **options):
        assert "return_offsets_mapping" not in options
        return self.inner(text, **options)


@pytest.mark.parametrize("kind", ["sd", "sd2"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_piece_for_each_position(target_of, kind, prompt):
    target = target_of(kind)
    pieces = target.pieces(prompt)
    assert len(pieces) == target.encode([prompt]).tokens.shape[1]
    assert pieces[0].kind == "start"
    assert [p.text for p in pieces if p.kind == "text"] == target.tokens(prompt)
    kinds = [p.kind for p in pieces]
    assert kinds == sorted(kinds, key=["start", "text", "end", "padding"].index)
    assert kinds.count("end") == 1
    assert all(0 <= p.start <= p.end <= len(prompt) for p in pieces)


@pytest.mark.parametrize("prompt", PROMPTS[:4])
def test_letters_of_a_piece_stand_at_its_place(target_of, prompt):
    for piece in target_of("sd").pieces(prompt):
        if piece.kind == "text" and piece.text.isascii() and piece.text.isalnum():
            assert prompt[piece.start : piece.end].lower() == piece.text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_slow_tokenizers_find_the_same_spans(target_of, prompt):
    tokenizer = target_of("sd").tokenizer
    length = tokenizer.model_max_length
    fast, slow = spell(tokenizer, prompt, length), spell(Slow(tokenizer), prompt, length)
    assert [(p.kind, p.text) for p in slow] == [(p.kind, p.text) for p in fast]
    inside = [(a, b) for a, b in zip(fast, slow, strict=True) if a.kind == "text"]
    assert [(b.start, b.end) for _, b in inside] == [(a.start, a.end) for a, _ in inside]


def test_what_is_not_found_gets_an_empty_span(target_of):
    tokenizer = target_of("sd").tokenizer
    names = tokenizer.convert_ids_to_tokens(tokenizer("cat dog", add_special_tokens=False).input_ids)
    assert all(start == end for start, end in look_up(tokenizer, names, "something else"[:0]))


def test_textual_inversion_words_count_as_typed(build_pipe, adapt):
    pipe = build_pipe("sd")
    pipe.tokenizer.add_tokens(["<toy>", "<toy>_1", "<toy>_2"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    target = adapt(pipe)
    pieces = [p for p in target.pieces("my <toy> on a <toy>, mine") if p.kind == "text"]
    toys = [(p.text, p.start, p.end) for p in pieces if p.text.startswith("<toy>")]
    assert toys == [(f"<toy>{end}", a, a + 5) for a in (3, 14) for end in ("", "_1", "_2")]
    rest = [p for p in pieces if p.start >= 19]
    assert "my <toy> on a <toy>, mine"[rest[0].start : rest[0].end] == ","
    assert "".join("my <toy> on a <toy>, mine"[p.start : p.end] for p in rest) == ",mine"


def test_unspell_without_anything_written_out_changes_nothing():
    pieces = [Piece("cat", "text", 2, 5), Piece("", "end")]
    assert unspell(pieces, "a cat", {}) == pieces


def test_closed_form_worlds_have_a_piece_for_each_word():
    target = Gaussian(context=4)
    assert isinstance(target, Target)
    kinds = [(p.text, p.kind, p.start, p.end) for p in target.pieces("a  cat")]
    assert kinds == [("a", "text", 0, 1), ("cat", "text", 3, 6), *[("", "padding", 0, 0)] * 2]


def test_nearest_words(target_of):
    """The table is made so that who is near is known."""
    tokenizer = target_of("sd").tokenizer
    table = torch.zeros(len(tokenizer), 4)
    words = ["red", "blue", "green"]
    for word, row in zip(words, ([1, 0, 0, 0], [1, 0.1, 0, 0], [1, 2, 0, 0]), strict=True):
        for i in tokenizer(word, add_special_tokens=False).input_ids:
            table[i] = torch.tensor(row, dtype=torch.float32)
    assert neighbors(tokenizer, table, ["red"], 2, among=words)[0][-1] != "red"
    assert len(neighbors(tokenizer, table, ["red"], 2, among=words)[0]) == 2
    assert neighbors(tokenizer, table, ["Red"], 5, among=["red"]) == [[]]
    assert neighbors(tokenizer, table, [], 5) == []


def test_the_vocabulary_is_the_default(target_of):
    (near,) = target_of("sd").neighbors(["cat"], 3)
    assert len(near) == 3
    assert all(w.isalpha() for w in near)
    assert "cat" not in near
