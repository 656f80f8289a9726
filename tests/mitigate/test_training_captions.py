"""Caption augmentations: what changes, how much, and that a visit always draws the same."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemoscope.errors import UnknownName, UsageError
from mnemoscope.mitigate.captions import (
    STYLES,
    CaptionAugmentation,
    TokenizerWords,
    add_numbers,
    add_tokens,
    choose,
    noise_embeddings,
    repeat_words,
    replace_tokens,
    visit_key,
)
from mnemoscope.models.gaussian import Gaussian

WORLD = Gaussian.tiny()  # its vocabulary is word0, word1, …
WORDS = st.lists(st.text("abcçé", min_size=1, max_size=4), max_size=8)
COUNTS = st.integers(0, 5)
SEEDS = st.integers(0, 2**40)


def source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def is_subsequence(few: list[str], many: list[str]) -> bool:
    rest = iter(many)
    return all(word in rest for word in few)


@given(WORDS, COUNTS, SEEDS)
@settings(deadline=None, max_examples=60)
def test_insertions_keep_the_caption_in_order_and_add_what_they_say(words, count, seed):
    caption = " ".join(words)
    tokens = add_tokens(caption, count, WORLD, source(seed)).split()
    numbers = add_numbers(caption, count, source(seed)).split()
    repeated = repeat_words(caption, count, source(seed)).split()
    for changed in (tokens, numbers):
        assert is_subsequence(words, changed)
        assert len(changed) == len(words) + count
    assert all(word.startswith("word") for word in (Counter(tokens) - Counter(words)))
    assert all(0 <= int(word) < 100_000 for word in (Counter(numbers) - Counter(words)))
    assert len(repeated) == (len(words) + count if words else 0)
    assert set(repeated) == set(words)
    assert is_subsequence(words, repeated)


@given(WORDS, COUNTS, SEEDS)
@settings(deadline=None, max_examples=60)
def test_replacement_changes_so_many_places_and_no_other(words, count, seed):
    changed = replace_tokens(" ".join(words), count, WORLD, source(seed)).split()
    assert len(changed) == len(words)
    different = [new for old, new in zip(words, changed, strict=True) if old != new]
    assert len(different) == min(count, len(words))
    assert all(new.startswith("word") for new in different)


@given(st.sampled_from(STYLES), st.lists(WORDS, min_size=2, max_size=4), COUNTS, SEEDS, st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_a_visit_draws_the_same_in_any_batch(style, captions, count, seed, step):
    captions, samples = [" ".join(words) for words in captions], list(range(7, 7 + len(captions)))
    augment = CaptionAugmentation(style, count, vocabulary=WORLD, seed=seed)
    together = augment(captions, samples, step)
    alone = [
        CaptionAugmentation(style, count, vocabulary=WORLD, seed=seed)([c], [i], step)[0]
        for c, i in zip(captions, samples, strict=True)
    ]
    assert together == alone
    assert augment(captions[::-1], samples[::-1], step) == together[::-1]


@pytest.mark.parametrize("style", STYLES)
def test_seed_sample_and_step_draw_apart(style):
    caption = "two dogs run on a long beach in the evening"
    augment = CaptionAugmentation(style, vocabulary=WORLD)
    assert len(set(augment([caption] * 20, list(range(20)), 0))) > 15
    assert len({augment([caption], [0], step)[0] for step in range(20)}) > 15
    assert len({CaptionAugmentation(style, vocabulary=WORLD, seed=s)([caption], [0], 0)[0] for s in range(20)}) > 15
    assert visit_key(0, 1, 2) != visit_key(0, 2, 1)


def test_the_global_random_source_is_left_alone():
    before = torch.get_rng_state()
    CaptionAugmentation("replaced-tokens", vocabulary=WORLD)(["a cat"], [0], 0)
    noise_embeddings(torch.zeros(1, 2, 3), 1.0, seed=0, samples=[0], step=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_of_an_images_captions_is_drawn_alike_often():
    draw = CaptionAugmentation()
    found = Counter(draw([["a", "b", "c"]], [0], step)[0] for step in range(1500))
    assert set(found) == {"a", "b", "c"}
    assert all(abs(n - 500) < 4 * (1500 * 2 / 9) ** 0.5 for n in found.values())
    assert choose(["only"], source(0)) == "only"
    with pytest.raises(UsageError, match="no caption"):
        choose([], source(0))


def test_every_place_is_replaced_alike_often():
    places = Counter(
        replace_tokens("a b c d", 1, WORLD, source(s)).split().index(w)
        for s in range(1200)
        for w in replace_tokens("a b c d", 1, WORLD, source(s)).split()
        if w.startswith("word")
    )
    assert set(places) == {0, 1, 2, 3}
    assert all(abs(n - 300) < 4 * (1200 * 3 / 16) ** 0.5 for n in places.values())


def test_noise_has_its_scale_its_dtype_and_its_visit():
    tokens = torch.zeros(2, 40, 50, dtype=torch.float16)
    noise = noise_embeddings(tokens, 0.5, seed=0, samples=[3, 4], step=7)
    assert noise.dtype == torch.float16
    assert abs(float(noise.float().std()) - 0.5) < 0.02
    assert torch.equal(noise_embeddings(tokens[:1], 0.5, seed=0, samples=[4], step=7)[0], noise[1])
    assert not torch.equal(noise_embeddings(tokens[:1], 0.5, seed=0, samples=[4], step=8)[0], noise[1])


def test_a_tokenizers_words_leave_special_tokens_out():
    spelled = ["<s>", "cat ", "dog", "</s>", " "]

    class Tokenizer(SimpleNamespace):
        def __len__(self) -> int:
            return len(spelled)

    words = TokenizerWords(Tokenizer(all_special_ids=[0, 3], decode=lambda ids: spelled[ids[0]]))
    assert [words.entry(i) for i in range(words.entries)] == ["cat", "dog", ""]
    assert set(add_tokens("", 30, words, source(0)).split()) == {"cat", "dog"}


def test_what_makes_no_sense_gets_a_sentence():
    with pytest.raises(UnknownName, match="random-tokens"):
        CaptionAugmentation("random-token")
    with pytest.raises(UsageError, match="TokenizerWords"):
        CaptionAugmentation("replaced-tokens")
    with pytest.raises(UsageError, match="count"):
        CaptionAugmentation("random-numbers", -1)
    with pytest.raises(UsageError, match="2 captions for 1 samples"):
        CaptionAugmentation("random-numbers")(["a", "b"], [0], 0)
