"""Prompt perturbations: what is inserted, where, and that stronger ones contain the weaker."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch

from mnemoscope.errors import CannotAudit, UsageError
from mnemoscope.mitigate.base import Generation, generator
from mnemoscope.mitigate.perturb import EmbeddingNoise, RandomNumbers, RandomTokens, RepeatedWords, insert, noised
from mnemoscope.models.base import Lexicon
from mnemoscope.models.gaussian import Gaussian

INSERTING = [RandomTokens, RandomNumbers, RepeatedWords]
PROMPT = "two dogs on a beach"


def start(target, prompts=(PROMPT, "a cat"), keys=(3, 4)):
    return Generation(target.noise([0, 1]), target.encode(list(prompts)), target.encode([""]), prompts, keys)


def test_a_word_goes_into_every_gap_alike_often():
    found = Counter(insert("b c", 1, lambda source: "a", generator(key, "test")) for key in range(3000))
    assert set(found) == {"a b c", "b a c", "b c a"}
    assert all(abs(n - 1000) < 4 * (3000 * 2 / 9) ** 0.5 for n in found.values())


def test_nothing_inserted_is_the_prompt():
    assert insert(PROMPT, 0, lambda source: "a", generator(0, "test")) == PROMPT


@pytest.mark.parametrize("method", INSERTING)
@pytest.mark.parametrize("kind", ["gaussian", "sd"])
def test_more_insertions_begin_with_the_fewer(method, kind, target_of):
    target = Gaussian.tiny() if kind == "gaussian" else target_of(kind)
    g = start(target)
    texts = [method(count).prepare(target, g).prompts for count in range(4)]
    assert texts[0] == g.prompts
    for fewer, more in pairwise(texts):
        for a, b in zip(fewer, more, strict=True):
            words = b.split()
            assert a in {" ".join(words[:i] + words[i + n :]) for i in range(len(words)) for n in (1, 2, 3)}


@pytest.mark.parametrize("method", INSERTING)
def test_embeddings_are_those_of_the_new_prompts(method, target_of):
    target = target_of("sd")
    prepared = method().prepare(target, start(target))
    assert torch.equal(prepared.cond.tokens, target.encode(list(prepared.prompts)).tokens)
    assert len(set(prepared.prompts)) == 2


def test_words_that_are_repeated_are_the_prompts_own():
    target = Gaussian.tiny()
    (text, _) = RepeatedWords(8).prepare(target, start(target)).prompts
    assert Counter(text.split()) > Counter(PROMPT.split())
    assert set(text.split()) == set(PROMPT.split())
    assert RepeatedWords().prepare(target, start(target, ("", "a cat"))).prompts[0] == ""


def test_numbers_are_numbers():
    target = Gaussian.tiny()
    (text, _) = RandomNumbers(6).prepare(target, start(target)).prompts
    numbers = [word for word in text.split() if word not in PROMPT.split()]
    assert len(numbers) == 6
    assert all(0 <= int(n) < 100_000 for n in numbers)


def test_random_tokens_come_from_the_vocabulary(target_of):
    target = target_of("sd")
    assert isinstance(target, Lexicon)
    vocabulary = {target.entry(i) for i in range(target.entries)}
    assert not any("<|" in text for text in vocabulary)
    (text, _) = RandomTokens(6).prepare(target, start(target)).prompts
    assert all(word in vocabulary for word in set(text.split()) - set(PROMPT.split()))


def test_a_target_without_a_vocabulary_is_told_what_to_use(bare):
    target = Gaussian.tiny()
    with pytest.raises(CannotAudit, match="random-numbers"):
        RandomTokens().prepare(bare(target), start(target))


def test_noise_on_the_embedding_is_paired_and_has_its_scale():
    tokens = torch.zeros(2, 40, 50)
    weak, strong = noised(tokens, 0.1, (1, 2)), noised(tokens, 0.4, (1, 2))
    torch.testing.assert_close(4 * weak, strong)
    assert abs(float(weak.std()) - 0.1) < 0.003
    assert not torch.equal(weak[0], weak[1])
    torch.testing.assert_close(noised(tokens[:1], 0.1, (2,)), weak[1:])


def test_values_that_mean_nothing():
    for method in INSERTING:
        with pytest.raises(UsageError, match="count"):
            method(-1)
    with pytest.raises(UsageError, match="scale"):
        EmbeddingNoise(-0.1)
