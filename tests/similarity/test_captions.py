"""Image–text scores: CLIP on a tiny random model, the bundled world's own."""

import json

import pytest
import torch

from mnemoscope import World
from mnemoscope.errors import UsageError
from mnemoscope.similarity.captions import CLIP, CaptionScore, WorldCaptions, build


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A CLIP model of random weights with a tokenizer of single letters."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=16)
    tokenizer.save_pretrained(folder)
    ids = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = CLIPTextConfig(vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                          max_position_embeddings=16, projection_dim=8, **ids)  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                              patch_size=8, projection_dim=8)  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).save_pretrained(
        folder
    )
    return folder


def pictures(n, size=48):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_clip_is_the_cosine_of_the_two_embeddings(tiny_clip):
    from transformers import CLIPModel, CLIPTokenizer

    score, model, tokenizer = (
        CLIP(str(tiny_clip)),
        CLIPModel.from_pretrained(tiny_clip),
        CLIPTokenizer.from_pretrained(tiny_clip),
    )
    x, captions = pictures(3, 32), ["a cat", "dog", "zebra"]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP.MEAN, CLIP.STD))
    with torch.no_grad():
        tokens = tokenizer(captions, padding=True, return_tensors="pt")
        out = model(pixel_values=(x - mean) / std, **tokens)
    expected = (out.image_embeds * out.text_embeds).sum(1)
    assert torch.allclose(score(x, captions), expected, atol=1e-5)
    assert isinstance(score, CaptionScore)
    assert score.name.startswith(f"clip:{tiny_clip.name}-")
    assert json.loads(json.dumps(score.identity())) == score.identity()


def test_clip_takes_other_shapes_and_long_captions(tiny_clip):
    x = torch.nn.functional.interpolate(pictures(1), size=(40, 90))
    assert CLIP(str(tiny_clip))(x, ["long " * 50]).isfinite().all()


def test_clip_that_is_none_gets_a_sentence(tmp_path):
    with pytest.raises(UsageError, match="cannot be loaded as a CLIP model"):
        CLIP(str(tmp_path))


def test_pairs_must_be_pairs():
    with pytest.raises(UsageError, match="2 pictures for 1 captions"):
        WorldCaptions()(pictures(2), ["one"])


def test_the_worlds_own_score_knows_its_world():
    """Right caption against the next one, for pictures it was trained on and for twins, which it was not."""
    world, score = World(), build("world-captions")
    for rows, least in ((world.of("planted"), 0.97), (world.of("twin"), 0.8)):
        x, captions = world.pictures(r.picture for r in rows), [r.caption for r in rows]
        right, wrong = score(x, captions), score(x, captions[1:] + captions[:1])
        assert (right > wrong).float().mean() > least
        assert right.abs().max() <= 1 + 1e-5


def test_order_and_case_of_words_do_not_matter():
    score = WorldCaptions()
    x = pictures(1, 64)
    assert torch.allclose(score(x, ["Red Apple, fruit"]), score(x, ["fruit red apple"]), atol=1e-6)
    assert score(x, [""]).isfinite().all()
