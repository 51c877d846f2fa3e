import unicodedata
from hashlib import shake_128

import numpy as np
import pytest
import torch

from engine.errors import UsageError
from recipes.lib import glyphs
from recipes.lib.captions import Captions, collate, embed, read_captions

pytestmark = pytest.mark.timeout(30)
SNOWMAN = "\N{SNOWMAN}"


def test_captions_name_the_symbols():
    characters = glyphs.characters()
    assert len(characters) > 300
    assert glyphs.caption(SNOWMAN) == "sketch of SNOWMAN"
    assert len({unicodedata.name(c) for c in characters}) == len(characters)


def test_a_drawing_grows_frame_by_frame_into_the_whole_outline():
    frames = glyphs.drawing(SNOWMAN, 4, 32, 32)
    ink = frames.sum(axis=(1, 2))
    assert frames.shape == (4, 32, 32)
    assert frames.dtype == np.float32
    assert (np.diff(frames, axis=0) >= 0).all()
    assert (np.diff(ink) > 1).all()
    assert 0 <= frames.min() < frames.max() <= 1
    np.testing.assert_array_equal(frames[-1], glyphs.drawing(SNOWMAN, 1, 32, 32)[0])
    assert not np.array_equal(frames[-1], glyphs.drawing("\N{BLACK STAR}", 4, 32, 32)[-1])


def test_drawings_are_upright():
    """The stem of an umbrella is below its canopy, which is the wide part."""
    picture = glyphs.drawing("\N{UMBRELLA}", 1, 32, 32)[0] > 0.3
    assert picture[:16].any(axis=0).sum() > picture[20:].any(axis=0).sum()


def test_latents_hold_every_pixel_and_repeat():
    latent = glyphs.latent_video(SNOWMAN, 4, 16, 8, 8)
    assert latent.shape == (4, 16, 8, 8)
    picture = torch.nn.functional.pixel_shuffle(latent, 4)[:, 0]
    torch.testing.assert_close(picture, torch.from_numpy(glyphs.drawing(SNOWMAN, 4, 32, 32)) * 2 - 1)
    again = glyphs.latent_video.__wrapped__(SNOWMAN, 4, 16, 8, 8)
    assert torch.equal(latent, again)
    with pytest.raises(ValueError, match="must be a square"):
        glyphs.latent_video(SNOWMAN, 4, 12, 8, 8)


def test_an_embedding_is_fixed_for_ever_and_close_for_like_words():
    assert embed("sketch of SNOWMAN", 4, 64).shape == (4, 64)
    bits = [shake_128(gram).digest(1)[0] >> 7 for gram in (b"<of", b"of>")]
    assert embed("sketch of SNOWMAN", 4, 64)[1, 0].item() == pytest.approx(sum(2 * b - 1 for b in bits) / 2**0.5)
    assert torch.equal(embed("sketch", 2, 8), embed("SKETCH of", 2, 8)[:1].repeat(2, 1) * torch.tensor([[1.0], [0]]))
    assert not embed("", 4, 64).any()

    def likeness(a: str, b: str) -> float:
        return torch.cosine_similarity(embed(a, 1, 512), embed(b, 1, 512)).item()

    assert likeness("snowman", "snowmen") > 0.4 > 0.2 > likeness("snowman", "umbrella")


def test_words_beyond_the_last_token_are_dropped():
    assert torch.equal(embed("a b c d", 2, 8), embed("a b", 2, 8))


def test_data_repeats_and_collates():
    data = Captions(["a", "b"], 3, 8, repeat=2)
    assert len(data) == 4
    assert torch.equal(data[0], data[2])
    assert not torch.equal(data[0], data[1])
    assert collate([data[0], data[1]]).shape == (2, 3, 8)
    assert len(collate([])) == 0


def test_captions_come_from_a_file_one_a_line(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("a cat\n\n  a dog  \n")
    assert read_captions(path) == ["a cat", "a dog"]
    assert "sketch of SNOWMAN" in read_captions(None)


@pytest.mark.parametrize("content", [None, b"\n \n", b"\xff\xfe"])
def test_an_unreadable_or_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "captions.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"captions\.txt"):
        read_captions(path)
