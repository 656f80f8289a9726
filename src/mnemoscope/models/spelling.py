"""How a prompt is spelled in tokens: what each position of an encoded prompt stands for, and which words lie close by.

Shared by adapters whose text goes through a transformers tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import CannotAudit, UsageError
from .base import Piece
from .folders import first_line, is_panic

WHOLE = "</w>"
"""How CLIP's vocabulary marks a token that ends a word."""


def clean(prompt: str) -> str:
    """The prompt, if it is text that can be written down."""
    try:
        prompt.encode()
    except UnicodeEncodeError as e:
        raise UsageError(
            f"prompt {prompt[:40]!r} has a broken character at position {e.start}; save it as UTF-8."
        ) from None
    return prompt


def tokenize(tokenizer: Any, text: str | list[str], **options: Any) -> Any:
    """What a tokenizer makes of a text or several: ``tokenizer(text, **options)``.

    Raises:
        CannotAudit: the settings in its ``tokenizer.json`` contradict each other, so that the library gives up.
    """
    try:
        return tokenizer(text, **options)
    except BaseException as e:
        if not is_panic(e):
            raise
        raise CannotAudit(
            f"the model's tokenizer cannot read a text ({first_line(e)}); download or copy its tokenizer again."
        ) from e


def spell(tokenizer: Any, text: str, length: int) -> list[Piece]:
    """One :class:`Piece` for each of the ``length`` positions of a padded and cut prompt, start and end included.

    Character spans come from the tokenizer where it keeps them (the fast ones), and else from looking the tokens up in the
    text one after the other.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    options = {"padding": "max_length", "truncation": True, "max_length": length, "return_attention_mask": True}
    encoded = tokenize(tokenizer, text, **options, **({"return_offsets_mapping": True} if fast else {}))
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    names = tokenizer.convert_ids_to_tokens(ids)
    spans = encoded["offset_mapping"] if fast else look_up(tokenizer, names, text)
    pieces: list[Piece] = []
    for i, (token, seen, name, (start, end)) in enumerate(zip(ids, mask, names, spans, strict=True)):
        if not seen:
            pieces.append(Piece("", "padding"))
        elif i == 0 and token == tokenizer.bos_token_id:
            pieces.append(Piece("", "start"))
        elif token == tokenizer.eos_token_id and start == end:
            pieces.append(Piece("", "end"))
        else:
            pieces.append(Piece(name.removesuffix(WHOLE), "text", start, end))
    return pieces


def look_up(tokenizer: Any, names: Sequence[str], text: str) -> list[tuple[int, int]]:
    """Character spans of tokens, by searching the lower-cased text from left to right; (0, 0) for special tokens.

    Tokens that hold parts of a character's bytes are read together until they spell something. What is not found (the
    tokenizer normalized it away) gets an empty span where it should have been.
    """
    lowered = "".join(low if len(low := c.lower()) == 1 else c for c in text)
    special = set(tokenizer.all_special_tokens)
    spans, waiting, cursor = [(0, 0)] * len(names), [], 0
    for i, name in enumerate(names):
        if name in special:
            continue
        waiting.append(i)
        spelled = tokenizer.convert_tokens_to_string([names[j] for j in waiting]).replace(WHOLE, " ").strip()
        if "\ufffd" in spelled and len(waiting) < 8:
            continue
        at = lowered.find(spelled.lower(), cursor)
        start, end = (cursor, cursor) if at < 0 else (at, at + len(spelled))
        for j in waiting:
            spans[j] = (start, end)
        waiting, cursor = [], end
    return spans


def unspell(pieces: Sequence[Piece], spelled: str, written_out: Mapping[str, str]) -> list[Piece]:
    """Pieces of ``spelled`` with their spans in the prompt as it was typed.

    Args:
        pieces: Of the text in which words were written out.
        spelled: That text.
        written_out: What was written out, as it stands in ``spelled`` → as it was typed (textual inversion writes one word
            as several tokens).
    """
    origin = list(_origins(spelled, written_out))
    return [replace(p, start=origin[p.start][0], end=origin[p.end - 1][1]) if p.end > p.start else p for p in pieces]


def _origins(spelled: str, written_out: Mapping[str, str]) -> Iterator[tuple[int, int]]:
    """For each character of ``spelled``, the span it comes from."""
    long_first = sorted(written_out, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, long_first)) or r"(?!)")
    cursor = at = 0
    for found in [*pattern.finditer(spelled), None]:
        stop = len(spelled) if found is None else found.start()
        yield from ((at + i, at + i + 1) for i in range(stop - cursor))
        at += stop - cursor
        if found is not None:
            typed = len(written_out[found[0]])
            yield from [(at, at + typed)] * len(found[0])
            cursor, at = found.end(), at + typed


def neighbors(
    tokenizer: Any,
    table: Float[Tensor, "token dim"],
    words: Sequence[str],
    k: int,
    among: Collection[str] | None = None,
) -> list[list[str]]:
    """The k words whose token embeddings lie closest to each word's, by cosine, nearest first.

    Args:
        tokenizer: With CLIP's end-of-word marks.
        table: The text encoder's token embeddings; of a word of several tokens, their mean is taken.
        words: Whose neighbors.
        k: How many; fewer if there are no more.
        among: Words to choose from; default: the whole words of the vocabulary, some of which are ends of longer words.
    """
    if among is None:
        among = {name.removesuffix(WHOLE) for name in tokenizer.get_vocab() if name.endswith(WHOLE)}
    known = sorted({w.casefold() for w in among if len(w) > 1 and w.isalpha()})
    if not known or not words:
        return [[] for _ in words]
    own, others = (_mean_rows(tokenizer, table, list(some)) for some in (words, known))
    best = (
        (own @ others.T).topk(min(k + 1, len(known)), dim=1).indices.tolist()
    )  # one more: the word itself may be there
    return [[known[i] for i in row if known[i] != word.casefold()][:k] for word, row in zip(words, best, strict=True)]


def _mean_rows(tokenizer: Any, table: Tensor, words: list[str]) -> Float[Tensor, "word dim"]:
    """The mean embedding of each word's tokens, of unit length; 0 for a word without tokens."""
    ids = tokenize(tokenizer, words, add_special_tokens=False).input_ids
    flat = torch.tensor([i for row in ids for i in row], dtype=torch.long, device=table.device)
    owner = torch.tensor([j for j, row in enumerate(ids) for _ in row], dtype=torch.long, device=table.device)
    sums = torch.zeros(len(words), table.shape[1], device=table.device)
    return normalize(sums.index_add(0, owner, table.detach().float()[flat]), dim=1)
