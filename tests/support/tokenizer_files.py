"""Tokenizers of the kinds of T5 and CLIP, learned from a few texts, in the files that the published ones have."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from dit_jax.encoders import tokens
from dit_jax.encoders.clip_text import END, START


def write_t5(folder: Path, texts: Sequence[str]) -> Path:
    """`tokenizer.json`, as transformers writes it, of at most 300 sentence pieces; returns the folder."""
    library, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    own = library.Tokenizer(library.models.Unigram())
    own.pre_tokenizer = library.pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = library.trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    own.train_from_iterator(texts, trainer)
    vocabulary = [tuple(piece) for piece in json.loads(own.to_str())["model"]["vocab"]]
    assert [piece for piece, _ in vocabulary[:3]] == special
    vocabulary += [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    transformers.T5Tokenizer(vocab=vocabulary).save_pretrained(folder)
    return folder


def write_clip(folder: Path, texts: Sequence[str]) -> Path:
    """`vocab.json` and `merges.txt`: 256 bytes, the same at the end of words, merges, and CLIP's ids of start and end."""
    library = pytest.importorskip("tokenizers")
    own = tokens.CLIPTokens.built(library, library.models.BPE(end_of_word_suffix="</w>"))
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=900, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    own.train_from_iterator(texts, trainer)
    merges = json.loads(own.to_str())["model"]["merges"]
    pieces = sorted(alphabet)
    pieces = dict.fromkeys([*pieces, *(piece + "</w>" for piece in pieces), *("".join(pair) for pair in merges)])
    ids = {piece: i for i, piece in enumerate(pieces)} | {"<|startoftext|>": START, "<|endoftext|>": END}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(ids))
    lines = ("#version: 0.2", *(f"{first} {second}" for first, second in merges))
    (folder / "merges.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder
