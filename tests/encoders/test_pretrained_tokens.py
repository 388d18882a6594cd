"""The tokenizers of T5 and CLIP beside those of transformers, on fifty sentences.

The published vocabularies are not at hand, so that small ones are learned here. `DIT_JAX_TOKENIZERS=<folder>` names a folder with
the published ones of Stable Diffusion 3 (`tokenizer_1` and `tokenizer_3`), which are then compared too.
"""

import os

import numpy as np
import pytest
from tokenizer_files import write_clip, write_t5

from dit_jax.encoders import tokens

pytest.importorskip("tokenizers")
SENTENCES = (
    "a three",
    "",
    " ",
    "A photo of a cat, moving left.",
    "  two  spaces   and\ttabs\tand\nnew lines\r\n",
    "naïve café, crème brûlée, façade",
    "Ångström, Øresund, Łódź, Žižek",
    "e\u0301 is e and an accent, é is one letter",
    "ÀÉÎÕÜ IN CAPITALS",
    "Straße, STRASSE, straße",
    "İstanbul and \u0131s\u0131",
    "日本語の文章です。",
    "一只猫坐在窗边",
    "한국어 문장",
    "中文 and English 混在 together",
    "Ελληνικά γράμματα",
    "Русский текст, ёлка",
    "שלום עולם",
    "مرحبا بالعالم",
    "हिन्दी में एक वाक्य",
    "ภาษาไทย",
    "🙂 a smile",
    "👩‍👩‍👧‍👦 a family, 🏳️‍🌈 a flag, 👍🏽 a thumb",
    "a🙂b🙂c",
    "0 1 2 3 4 5 6 7 8 9",
    "1234567890",
    "3.14159, 1,000,000 and -7e-3",
    "20 % of 4 x 4 = 3.2",
    "½ ² ³ ④ Ⅳ",
    "don't, I'll, we've, they're, I'd, it's, I'm",
    "DON'T, I'LL, WE'VE",
    "rock 'n' roll",
    "“curly quotes” and \u2018single ones\u2019 \u2013 and — dashes…",
    "!?!?.,;:-_()[]{}<>/\\|@#$%^&*~`+=",
    "well-known, state-of-the-art",
    "snake_case and camelCase and kebab-case",
    "https://example.org/a?b=c&d=e#f",
    "name@example.org",
    "<b>bold</b> &amp; &lt;",
    'a sign that says "HELLO"',
    "zero\u200bwidth and soft\u00adhyphen",
    "no\u00a0break and ideographic\u3000space",
    "\ufeffa mark of the byte order",
    "line\u2028separator and paragraph\u2029line",
    "ﬁne ﬂuid ligatures, \uff26\uff35\uff2c\uff2c \uff57\uff49\uff44\uff54\uff48",
    "\uff41\u3000\uff42",
    "x" * 300,
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    " ".join(f"word{i % 7}" if i % 3 else "the quick brown fox" for i in range(200)),
    "the end </s> and <|endoftext|> and <pad> and <extra_id_0>",  # special tokens, as in transformers
)
assert len(SENTENCES) == len(set(SENTENCES)) == 50
WORDS = [*SENTENCES[:40], *("the quick brown fox jumps over the lazy dog, a cat and a three" for _ in range(20))]


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return write_t5(tmp_path_factory.mktemp("t5"), WORDS)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"), WORDS)


def published(name):
    folder = os.environ.get("DIT_JAX_TOKENIZERS")
    return [f"{folder}/{name}"] if folder else []


@pytest.mark.parametrize("folder", ["learned", *published("tokenizer_3")])
@pytest.mark.parametrize("length", [77, 12, 256])
def test_t5_equals_transformers(folder, length, t5):
    """Catches an end that is lost or doubled, padding with another id, white space that is kept, and a cut at another token."""
    transformers = pytest.importorskip("transformers")
    folder = t5 if folder == "learned" else folder
    theirs = transformers.T5TokenizerFast.from_pretrained(folder)
    expected = theirs(list(SENTENCES), padding="max_length", max_length=length, truncation=True)
    found = tokens.T5Tokens(str(folder), length)(SENTENCES)
    for sentence, ids, own in zip(SENTENCES, expected["input_ids"], found.ids, strict=True):
        assert own.tolist() == ids, sentence
    np.testing.assert_array_equal(found.mask, np.array(expected["attention_mask"], bool))
    assert 48 in found.lost


@pytest.mark.parametrize("folder", ["learned", *published("tokenizer_1")])
@pytest.mark.parametrize("length", [77, 12])
def test_clip_equals_transformers(folder, length, clip):
    """Catches another normaliser or pattern, letters that are not lowered, and a start or end that a long text loses."""
    transformers = pytest.importorskip("transformers")
    folder = clip if folder == "learned" else folder
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    expected = theirs(list(SENTENCES), padding="max_length", max_length=length, truncation=True)
    ours = tokens.CLIPTokens(str(folder), length, pad=theirs.eos_token_id)
    found = ours(SENTENCES)
    for sentence, ids, own in zip(SENTENCES, expected["input_ids"], found.ids, strict=True):
        assert own.tolist() == ids, sentence
    np.testing.assert_array_equal(found.mask, np.array(expected["attention_mask"], bool))
    padded = tokens.CLIPTokens(str(folder), length, pad=0)(SENTENCES)
    np.testing.assert_array_equal(padded.ids, np.where(found.mask, found.ids, 0))
