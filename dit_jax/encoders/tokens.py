"""Tokenizers: text to token ids of a fixed length, with a mask of the tokens that are not padding.

N texts, M tokens. Two need nothing and are for encoders that are trained here: bytes, and byte pairs learned from captions. Two
read the files of pretrained encoders with the package `tokenizers` (`pip install 'dit_jax[text]'`): T5's and CLIP's.
"""

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dit_jax.errors import UserError
from dit_jax.storage.bounded import read_json
from dit_jax.storage.paths import local_path

PAD, END, UNKNOWN = 0, 1, 2  # ids of the tokenizers of this module, as in ByT5
FIRST_BYTE = 3


class Tokens(NamedTuple):
    """Encoded texts.

    Fields:
        ids: int32[N, M].
        mask: bool[N, M], False for padding.
        lost: {number of the text: its part that does not fit}, for texts that were cut.
    """

    ids: np.ndarray
    mask: np.ndarray
    lost: dict[int, str]


class Tokenizer(Protocol):
    """A frozen dataclass.

    Fields:
        length: M.
        vocabulary: number of ids.
    """

    @property
    def length(self) -> int: ...

    @property
    def vocabulary(self) -> int: ...

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """The tokens of the texts. A text that does not fit is cut, and its end is in `lost`."""

    def fingerprint(self) -> str:
        """SHA-256 of all that determines the ids."""


def padded(rows: Sequence[Sequence[int]], length: int, end: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask): each row is cut to length - 1, ended by `end`, and padded."""
    ids, mask = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        kept = [*row[: length - 1], end]
        ids[i, : len(kept)], mask[i, : len(kept)] = kept, True
    return ids, mask


def check_length(length: int) -> None:
    """Raises a UserError for a length without room for a token and the end."""
    if length < 2:
        raise UserError(f"the length of texts is {length}; it must be at least 2: one token and the end")


@dataclass(frozen=True)
class Bytes:
    """Each byte of UTF-8 is a token: id = byte + 3, with 0 for padding and 1 for the end (Xue et al. 2022, ByT5)."""

    length: int = 64

    vocabulary = FIRST_BYTE + 256

    def __post_init__(self):
        check_length(self.length)

    def __call__(self, texts: Sequence[str]) -> Tokens:
        encoded = [text.encode("utf-8", "strict") for text in texts]
        ids, mask = padded([[FIRST_BYTE + byte for byte in text] for text in encoded], self.length, END, PAD)
        kept = self.length - 1
        lost = {i: text[kept:].decode("utf-8", "ignore") for i, text in enumerate(encoded) if len(text) > kept}
        return Tokens(ids, mask, lost)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"bytes {self.length}".encode()).hexdigest()


@dataclass(frozen=True)
class BytePairs:
    """Byte pairs learned from captions: frequent neighbours become one token (Sennrich et al. 2016, algorithm 1), from bytes on.

    Words are separated by spaces; a space belongs to the word behind it. Ids: 0 padding, 1 the end, then 256 bytes, then the
    merges in their order.

    Fields:
        merges: pairs of ids, in the order in which they were learned.
    """

    merges: tuple[tuple[int, int], ...]
    length: int = 64
    _words: dict[bytes, list[int]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self):
        check_length(self.length)

    @property
    def vocabulary(self) -> int:
        return FIRST_BYTE + 256 + len(self.merges)

    @cached_property
    def _ranks(self) -> dict[tuple[int, int], int]:
        return {pair: rank for rank, pair in enumerate(self.merges)}

    def __call__(self, texts: Sequence[str]) -> Tokens:
        rows = [[token for word in words_of(text) for token in self._encode(word)] for text in texts]
        ids, mask = padded(rows, self.length, END, PAD)
        kept = self.length - 1
        lost = {i: self._decode(row[kept:]) for i, row in enumerate(rows) if len(row) > kept}
        return Tokens(ids, mask, lost)

    def _encode(self, word: bytes) -> list[int]:
        if word not in self._words:
            tokens = [FIRST_BYTE + byte for byte in word]
            while len(tokens) > 1:
                pair = min(itertools.pairwise(tokens), key=lambda pair: self._ranks.get(pair, len(self.merges)))
                if pair not in self._ranks:
                    break
                tokens = merged(tokens, pair, FIRST_BYTE + 256 + self._ranks[pair])
            self._words[word] = tokens
        return self._words[word]

    def _decode(self, tokens: Sequence[int]) -> str:
        def spelled(token: int) -> bytes:
            if token < FIRST_BYTE + 256:
                return bytes([token - FIRST_BYTE])
            first, second = self.merges[token - FIRST_BYTE - 256]
            return spelled(first) + spelled(second)

        return b"".join(map(spelled, tokens)).decode("utf-8", "ignore")

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([self.length, self.merges]).encode()).hexdigest()

    @classmethod
    def learned(cls, captions: Iterable[str], vocabulary: int = 512, length: int = 64) -> "BytePairs":
        """Learns the pairs from captions, a function of the captions alone; of equal counts the smaller pair comes first.

        vocabulary: of ids at most; fewer if the captions have no pair that occurs twice.

        Raises:
            UserError: the vocabulary has no room for the bytes.
        """
        if vocabulary < FIRST_BYTE + 256:
            raise UserError(f"the vocabulary is {vocabulary}; it must be at least {FIRST_BYTE + 256}, the bytes and three others")
        counts = Counter(word for caption in captions for word in words_of(caption))
        words = {word: [FIRST_BYTE + byte for byte in word] for word in counts}
        merges: list[tuple[int, int]] = []
        while FIRST_BYTE + 256 + len(merges) < vocabulary:
            pairs: Counter[tuple[int, int]] = Counter()
            for word, tokens in words.items():
                for pair in itertools.pairwise(tokens):
                    pairs[pair] += counts[word]
            best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
            if best is None or pairs[best] < 2:
                break
            token = FIRST_BYTE + 256 + len(merges)
            merges.append(best)
            words = {word: merged(tokens, best, token) for word, tokens in words.items()}
        return cls(tuple(merges), length)


def words_of(text: str) -> list[bytes]:
    """The words of a text in UTF-8, each with the space before it."""
    words, word = [], ""
    for character in text:
        if character == " " and word:
            words.append(word)
            word = ""
        word += character
    return [word.encode("utf-8") for word in [*words, word] if word]


def merged(tokens: Sequence[int], pair: tuple[int, int], token: int) -> list[int]:
    """The tokens with each occurrence of the pair, from the left, replaced by `token`."""
    out, i = [], 0
    while i < len(tokens):
        if tuple(tokens[i : i + 2]) == pair:
            out.append(token)
            i += 2
        else:
            out.append(tokens[i])
            i += 1
    return out


def _library() -> Any:
    """The package `tokenizers`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError:
        raise UserError("T5's and CLIP's tokenizers need the package tokenizers: pip install 'dit_jax[text]'") from None
    return tokenizers


def _opened(path: str | os.PathLike, names: Sequence[str]) -> list[Path]:
    """The files of a tokenizer in a folder.

    Raises:
        UserError: one does not exist.
    """
    folder = local_path(path)
    files = [folder / name for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{folder} has no {' and no '.join(missing)}; give the tokenizer's folder of the published model")
    return files


@dataclass(frozen=True)
class Pretrained:
    """The tokenizer of a published encoder, read by the package `tokenizers`. Base class of `T5Tokens` and `CLIPTokens`.

    Fields:
        path: folder with the tokenizer's files, as published.
        length: M.
    """

    path: str
    length: int

    def __post_init__(self):
        check_length(self.length)

    @property
    def files(self) -> list[Path]:
        raise NotImplementedError

    @cached_property
    def tokenizer(self) -> Any:
        """The package's tokenizer, without special tokens, cutting or padding."""
        raise NotImplementedError

    @property
    def vocabulary(self) -> int:
        size: int = self.tokenizer.get_vocab_size()
        return size

    def _encoded(self, texts: Sequence[str], room: int) -> tuple[list[list[int]], dict[int, str]]:
        """(ids of each text, cut to `room`; the lost ends)."""
        found = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        lost = {i: texts[i][x.offsets[room][0] :] for i, x in enumerate(found) if len(x.ids) > room}
        return [x.ids[:room] for x in found], lost

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{type(self).__name__} {self.length}".encode())
        for file in self.files:
            digest.update(file.read_bytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class T5Tokens(Pretrained):
    """T5's sentence pieces, from `tokenizer.json`: at most length - 1 tokens, the end (1), padding (0)."""

    length: int = 256

    @property
    def files(self) -> list[Path]:
        return _opened(self.path, ["tokenizer.json"])

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = _library().Tokenizer.from_file(str(self.files[0]))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def __call__(self, texts: Sequence[str]) -> Tokens:
        rows, lost = self._encoded(texts, self.length - 1)
        return Tokens(*padded(rows, self.length, 1, 0), lost)


@dataclass(frozen=True)
class CLIPTokens(Pretrained):
    """CLIP's lower-case byte pairs, from `vocab.json` and `merges.txt`: the start, at most length - 2 tokens, the end, padding.

    Fields:
        pad: id of padding: 49407, the end, for CLIP-L; 0 for the bigG of Stable Diffusion.
    """

    length: int = 77
    pad: int = 49407

    def __post_init__(self):
        check_length(self.length - 1)

    @property
    def files(self) -> list[Path]:
        return _opened(self.path, ["vocab.json", "merges.txt"])

    @cached_property
    def tokenizer(self) -> Any:
        library, (vocabulary, merges) = _library(), self.files
        model = library.models.BPE.from_file(str(vocabulary), str(merges), end_of_word_suffix="</w>", unk_token="<|endoftext|>")
        tokenizer = self.built(library, model)
        tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])  # of these names in a text, as in transformers
        return tokenizer

    @staticmethod
    def built(library: Any, model: Any) -> Any:
        """The package's tokenizer of a model of byte pairs, with CLIP's normaliser and pattern of words."""
        tokenizer = library.Tokenizer(model)
        normalizers, split = library.normalizers, library.pre_tokenizers
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(library.Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        pattern = library.Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
        tokenizer.pre_tokenizer = split.Sequence(
            [split.Split(pattern, behavior="removed", invert=True), split.ByteLevel(add_prefix_space=False)]
        )
        return tokenizer

    def __call__(self, texts: Sequence[str]) -> Tokens:
        start, end = (self.tokenizer.token_to_id(name) for name in ("<|startoftext|>", "<|endoftext|>"))
        rows, lost = self._encoded(texts, self.length - 2)
        ids, mask = padded([[start, *row] for row in rows], self.length, end, self.pad)
        return Tokens(ids, mask, lost)


def save_pairs(path: str | os.PathLike, pairs: BytePairs) -> None:
    """Writes learned byte pairs as JSON: {"length", "merges"}."""
    from dit_jax.storage.atomic import write_json

    write_json(local_path(path), {"length": pairs.length, "merges": [list(pair) for pair in pairs.merges]})


def read_pairs(path: str | os.PathLike) -> BytePairs:
    """Reads what `save_pairs` wrote.

    Raises:
        UserError: the file is damaged.
    """
    stored = read_json(local_path(path), "learn the pairs again", {"length": int, "merges": list})
    merges = [tuple(pair) for pair in stored["merges"] if isinstance(pair, list)]
    known = FIRST_BYTE + 256
    for i, pair in enumerate(merges):
        if len(pair) != 2 or not all(isinstance(x, int) and FIRST_BYTE <= x < known + i for x in pair):
            raise UserError(f"{path}: merge {i} is {list(pair)}; two earlier ids are needed; learn the pairs again")
    return BytePairs(tuple((a, b) for a, b in merges), stored["length"])
