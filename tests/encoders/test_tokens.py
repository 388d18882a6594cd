"""Tokenizers: bytes, learned byte pairs, and those of T5 and CLIP."""

import json

import numpy as np
import pytest

from dit_jax.encoders import tokens
from dit_jax.errors import UserError

TEXTS = ["a three", "", "naïve café — 日本語 🙂", "x" * 200]


def test_bytes():
    """Catches an id that is not ByT5's, padding that is not masked, and an end that a long text loses."""
    ids, mask, lost = tokens.Bytes(16)(TEXTS)
    assert ids.dtype == np.int32 and ids.shape == mask.shape == (4, 16)
    assert list(ids[0, :9]) == [*(3 + byte for byte in b"a three"), 1, 0] and mask[0].sum() == 8
    assert list(ids[1]) == [1] + [0] * 15 and list(ids[3]) == [3 + ord("x")] * 15 + [1]
    assert lost[3] == "x" * 185 and 2 in lost and lost.keys() == {2, 3}


def test_byte_pairs():
    """Catches pairs that depend on the order of captions, a word that loses bytes, and pairs across words."""
    captions = ["a three", "a handwritten three", "the three", "a seven"] * 3
    pairs = tokens.BytePairs.learned(captions, 300, 32)
    assert pairs == tokens.BytePairs.learned(captions[::-1], 300, 32)
    assert 0 < len(pairs.merges) <= 300 - 259
    ids, mask, lost = pairs(TEXTS[:3])
    for text, row in zip(TEXTS, ids, strict=False):
        assert pairs._decode([token for token in row if token > 1]) == text
    assert mask[0].sum() < 8 and not lost
    spelled = {pairs._decode([token]) for token in range(259, pairs.vocabulary)}
    assert " three" in spelled and not any(" " in word[1:] for word in spelled)
    assert pairs([TEXTS[3] * 2]).lost == {0: "x" * (400 - 31)}


def test_byte_pairs_survive_a_file(tmp_path):
    """Catches a file that is read as other pairs, and one that names ids which do not exist yet."""
    pairs = tokens.BytePairs.learned(["a three", "a three"], 270)
    tokens.save_pairs(tmp_path / "x.json", pairs)
    assert tokens.read_pairs(tmp_path / "x.json") == pairs
    (tmp_path / "x.json").write_text(json.dumps({"length": 9, "merges": [[5, 400]]}))
    with pytest.raises(UserError, match=r"merge 0 is \[5, 400\]"):
        tokens.read_pairs(tmp_path / "x.json")


def test_mistakes(tmp_path):
    """Catches a length without room, and a folder without files, that end in a trace."""
    with pytest.raises(UserError, match="the length of texts is 1"):
        tokens.Bytes(1)
    with pytest.raises(UserError, match=r"has no vocab\.json and no merges\.txt"):
        tokens.CLIPTokens(str(tmp_path)).files
    with pytest.raises(UserError, match="at least 259"):
        tokens.BytePairs.learned([], 100)
