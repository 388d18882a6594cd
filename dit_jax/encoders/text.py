"""Text as the condition: the outputs of one or several text encoders, joined as in Stable Diffusion 3.

B batch, M tokens of an encoder or of all, C width of the context, P width of the pooled text, N requests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.encoders import clip_text, t5, tokens
from dit_jax.encoders.clip_text import CLIPText
from dit_jax.encoders.conditioner import Requests
from dit_jax.encoders.t5 import T5Encoder
from dit_jax.errors import UserError
from dit_jax.models import layers
from dit_jax.parallel.rules import Rules
from dit_jax.runtime.console import say

TRAINED = ("bytes", "bpe")
CLIPS = {"clip_l": "L/14", "clip_g": "bigG/14", "clip_b32": "B/32"}
T5 = "t5_"  # with a size of `t5.SIZES` behind it
CONTEXT, POOLED, MASK = "context", "pooled", "context_mask"  # entries of the condition
TOKENS, PRESENT, NEGATIVE = "tokens_", "present", "negative_"  # names of a batch's entries, or their beginnings
NULL = "null"  # entry of the constants: what the frozen encoders make of ""
EMPTY = "empty"  # entry of a batch of `EmptyText`
LENGTHS = {"bytes": 64, "bpe": 64}
CLIP_LENGTH, T5_LENGTH = 77, 77
HEAD_WIDTH = 64


class Part(NamedTuple):
    """What one encoder makes of texts.

    Fields:
        context: f32[B, M, width].
        pooled: f32[B, P]; None if the encoder has none (T5).
        mask: bool[B, M], False for padding.
    """

    context: jax.Array
    pooled: jax.Array | None
    mask: jax.Array


class TokenEncoder(nn.Module):
    """A small encoder that is trained with the network: embeddings of tokens and positions, then `depth` blocks.

    (ids int32[B, M], mask bool[B, M]) -> f32[B, M, width]. The blocks are those of CLIP, in which each token attends to all that
    are not padding; after them comes a norm.
    """

    vocabulary: int
    length: int
    width: int
    depth: int

    rules = clip_text.RULES

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.5)
        x = nn.Embed(self.vocabulary, self.width, embedding_init=init, name="token_embedding")(ids)
        x = x + self.param("position_embedding", init, (self.length, self.width), jnp.float32)
        if not self.depth:
            return x
        bias = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)[:, None, None]
        blocks = nn.scan(
            clip_text.Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=self.depth
        )
        x, _ = blocks(max(self.width // HEAD_WIDTH, 1), "gelu", jnp.float32, jnp.float32, name="blocks")(x, bias)
        return nn.LayerNorm(clip_text.EPSILON, name="norm_final")(x)


@dataclass(frozen=True)
class TextTokens:
    """The entries of a batch for texts: {"tokens_<encoder>": int32[N, M]}. It can be pickled.

    What is lost of a text that does not fit is said on stderr, for the first such text only.

    Fields:
        tokenizers: (encoder, its tokenizer), of the encoders that are not missing.
    """

    tokenizers: tuple[tuple[str, tokens.Tokenizer], ...]
    _said: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, texts: Sequence[str]) -> Requests:
        entries = {}
        for name, tokenizer in self.tokenizers:
            found = tokenizer(texts)
            entries[TOKENS + name] = found.ids
            if found.lost and self._said.setdefault(name, found) is found:  # of several threads, one says it
                i, lost = next(iter(found.lost.items()))
                others = f" (and of {len(found.lost) - 1} others here)" if len(found.lost) > 1 else ""
                say(
                    f"{name} reads {tokenizer.length} tokens and does not see the end of {_short(texts[i])}: {_short(lost)}"
                    f"{others}; said once"
                )
        return entries


def _short(text: str, most: int = 200) -> str:
    return repr(text if len(text) <= most else text[:most] + "...")


@dataclass(frozen=True)
class Text:
    """Texts as {"context": f32[B, M, C], "pooled": f32[B, P]}, by a list of encoders. The null condition is the encoding of "".

    The CLIP encoders' contexts are joined along channels; those of the others follow along tokens. All are filled with zeros to
    the widest, C. Pooled texts are joined. A missing or dropped encoder contributes zeros. Pretrained encoders are frozen, unless
    they are trainable; bytes and bpe are small and trained with the network. Stable Diffusion 3 has encoders clip_l, clip_g,
    t5_xxl.

    A batch has "tokens_<encoder>" int32[B, M] for each encoder that is not missing, and "present" bool[B, number of encoders] if
    encoders are dropped. Requests are {"caption": N texts}, and "negative": N texts that replace the null condition.

    Fields:
        encoders: of bytes, bpe (trained); t5_small, t5_base, t5_large, t5_xl, t5_xxl, clip_l, clip_g, clip_b32 (pretrained).
        lengths: tokens M of each encoder; empty for 64 of bytes and bpe, and 77 of the others.
        weights: folders or files of pretrained encoders in Hugging Face's layout, as ("clip_l=/path", "t5_xxl=/path").
        sha256: SHA-256 that the weights' files must have, in the same form; any if empty. Set when they are read.
        tokenizers: folders of their tokenizers, in the same form; an encoder without one has its tokenizer beside its weights.
        missing: encoders that are not used; they contribute zeros, as Stable Diffusion 3 without T5.
        dropout: rate at which each encoder is dropped from an example of training; one rate for all, or one each; empty for none.
        width: features of bytes and bpe.
        depth: attention blocks of bytes and bpe; with 0 the context is the embedded tokens and their positions.
        merges: the byte pairs of bpe, one id after another, as `tokens.BytePairs.learned` finds them in captions.
        mask: give "context_mask" to the network and to T5, so that padding is not attended to (PixArt). Without it padding is.
        pooled: give "pooled" to the network, if an encoder has it; all but T5 have.
        trainable: train the pretrained encoders with the network, from their weights on; they are then parameters in float32.
        dtype: of pretrained encoders' activations, and of their weights if they are frozen.

    Source: Esser et al. 2024 (arXiv 2403.03206), section 4 and appendix B.3.
    """

    encoders: tuple[str, ...]
    lengths: tuple[int, ...] = ()
    weights: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = ()
    sha256: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    dropout: tuple[float, ...] = ()
    width: int = 128
    depth: int = 0
    merges: tuple[int, ...] = ()
    mask: bool = False
    pooled: bool = True
    trainable: bool = False
    dtype: layers.Dtype = jnp.bfloat16

    num_classes = 0
    takes_text = True

    def __post_init__(self):
        for name in ("encoders", "lengths", "weights", "tokenizers", "sha256", "missing", "dropout", "merges"):
            value = getattr(self, name)  # a config that was read from JSON gives lists
            object.__setattr__(self, name, (value,) if isinstance(value, (str, int, float)) else tuple(value))
        self._check_encoders()
        for name in ("weights", "tokenizers", "sha256"):
            self.by_encoder(name)
        if self.trainable and not self.pretrained:
            raise UserError(
                f"conditioner.trainable is True, and none of {', '.join(self.used)} is pretrained (bytes and bpe are always "
                "trained); leave it out"
            )
        if len(self.dropout) not in (0, 1, len(self.encoders)) or not all(0 <= rate < 1 for rate in self.dropout):
            raise UserError(
                f"conditioner.dropout is {self.dropout}; give one rate from 0 to below 1, or one for each of the "
                f"{len(self.encoders)} encoders"
            )
        if self.width < 1 or self.depth < 0:
            raise UserError(f"conditioner.width is {self.width} and depth {self.depth}; they must be at least 1 and 0")
        if self.depth and self.width >= HEAD_WIDTH and self.width % (self.width // HEAD_WIDTH):
            raise UserError(f"conditioner.width is {self.width}; with attention blocks it must be a multiple of {HEAD_WIDTH}")

    def _check_encoders(self) -> None:
        known = (*TRAINED, *(T5 + size for size in t5.SIZES), *CLIPS)
        if not self.encoders or len(set(self.encoders)) < len(self.encoders):
            raise UserError(f"conditioner.encoders is {self.encoders}; list one or several of {', '.join(known)}, each once")
        if wrong := [name for name in self.encoders if name not in known]:
            raise UserError(f"text encoder {wrong[0]!r} does not exist; choose from {', '.join(known)}")
        if wrong := [name for name in self.missing if name not in self.encoders]:
            raise UserError(f"conditioner.missing has {wrong[0]!r}, which is not one of the encoders {', '.join(self.encoders)}")
        if not self.used:
            raise UserError("conditioner.missing lists all encoders; at least one must be there to read the text")
        if self.lengths and len(self.lengths) != len(self.encoders):
            raise UserError(
                f"conditioner.lengths is {self.lengths}; give one length for each of the {len(self.encoders)} encoders"
            )
        for name in self.encoders:
            tokens.check_length(self.length(name))
        clips = {name: self.length(name) for name in self.encoders if name in CLIPS}
        if len(set(clips.values())) > 1 or max(clips.values(), default=0) > clip_text.MAX_TOKENS:
            raise UserError(f"the lengths of CLIP encoders are {clips}; they must be equal, and at most {clip_text.MAX_TOKENS}")
        if "bpe" in self.encoders and len(self.merges) % 2:
            raise UserError(f"conditioner.merges has {len(self.merges)} ids; it must have two for each pair")

    def by_encoder(self, field: str) -> dict[str, str]:
        """{encoder: value} of `weights`, `tokenizers` or `sha256`."""
        found = {}
        for entry in getattr(self, field):
            name, equals, path = entry.partition("=")
            if not equals or name not in self.encoders or name in TRAINED or name in found:
                pretrained = [name for name in self.encoders if name not in TRAINED]
                value = "SHA-256" if field == "sha256" else "path"
                raise UserError(
                    f"conditioner.{field} has {entry!r}; write <encoder>=<{value}>, once for each of "
                    f"{', '.join(pretrained) or 'the pretrained encoders (there is none)'}"
                )
            found[name] = path
        return found

    @property
    def used(self) -> tuple[str, ...]:
        """The encoders that are not missing."""
        return tuple(name for name in self.encoders if name not in self.missing)

    @property
    def pretrained(self) -> tuple[str, ...]:
        """The pretrained encoders that are not missing."""
        return tuple(name for name in self.used if name not in TRAINED)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The encoders whose weights are constants."""
        return () if self.trainable else self.pretrained

    @property
    def tuned(self) -> tuple[str, ...]:
        """The pretrained encoders that are trained."""
        return self.pretrained if self.trainable else ()

    @property
    def trained(self) -> tuple[str, ...]:
        """The encoders whose weights are parameters."""
        return tuple(name for name in self.used if name not in self.frozen)

    def length(self, name: str) -> int:
        """Tokens of an encoder."""
        if self.lengths:
            return self.lengths[self.encoders.index(name)]
        return LENGTHS.get(name, CLIP_LENGTH if name in CLIPS else T5_LENGTH)

    def weights_of(self, name: str) -> str:
        """The path of a pretrained encoder's weights.

        Raises:
            UserError: there is none.
        """
        path = self.by_encoder("weights").get(name, "")
        if not path:
            raise UserError(
                f"conditioner.weights has no path for {name}; give --config.conditioner.weights={name}=<folder or .safetensors "
                f"file> (to sample, --text_encoders={name}=...), or leave the encoder out with "
                f"--config.conditioner.missing={name}"
            )
        return path

    def tokenizer_of(self, name: str) -> tokens.Tokenizer:
        """The tokenizer of an encoder.

        Raises:
            UserError: a pretrained encoder has neither a tokenizer nor weights.
        """
        length = self.length(name)
        if name == "bytes":
            return tokens.Bytes(length)
        if name == "bpe":
            return tokens.BytePairs(tuple(zip(self.merges[::2], self.merges[1::2], strict=True)), length)
        path = self.by_encoder("tokenizers").get(name) or self.by_encoder("weights").get(name)
        if not path:
            raise UserError(
                f"{name} has no tokenizer; give --config.conditioner.tokenizers={name}=<its folder> (to sample, "
                f"--tokenizers={name}=...)"
            )
        if name in CLIPS:
            return tokens.CLIPTokens(path, length, pad=clip_pad(name))
        return tokens.T5Tokens(path, length)

    @cached_property
    def tokenizer(self) -> TextTokens:
        """The tokens of all encoders that are not missing, for texts on the host."""
        return TextTokens(tuple((name, self.tokenizer_of(name)) for name in self.used))

    def network(self, name: str) -> Any:
        """The Linen module of an encoder."""
        if name in TRAINED:
            vocabulary = tokens.FIRST_BYTE + 256 + (len(self.merges) // 2 if name == "bpe" else 0)
            return TokenEncoder(vocabulary, self.length(name), self.width, self.depth)
        dtypes = {"dtype": self.dtype, "param_dtype": jnp.float32 if self.trainable else self.dtype}
        return CLIPText.of(CLIPS[name], **dtypes) if name in CLIPS else T5Encoder.of(name.removeprefix(T5), **dtypes)

    def _widths(self, name: str) -> tuple[int, int]:
        """(width of the context, of the pooled text) of an encoder."""
        network = self.network(name)
        pooled = {"clip_l": network.width} if name == "clip_l" else {}
        if name in CLIPS:
            return network.width, pooled.get(name, network.projection_width)
        return network.width, self.width if name in TRAINED else 0

    @property
    def rules(self) -> Rules:
        return tuple(
            (rf"conditioner/{name}/(?:.*/)?{pattern}", spec)
            for name in self.trained
            for pattern, spec in self.network(name).rules
        )

    @property
    def matrices(self) -> dict[str, str]:
        """As of `models.network.Network`, of the encoders' kernels."""
        kinds = {"attention/qkv": "isoo", "attention/out": "iio", "mlp/out": "io", "projection": "io"}
        return {
            rf"conditioner/{name}/(?:.*/)?{layer}/kernel": own
            for name in self.trained
            for layer, own in (*kinds.items(), ("mlp/in", "iso" if name.startswith(T5) else "io"))
        }

    @property
    def constant_rules(self) -> Rules:
        """How `constants` are split over the mesh."""
        own = ((rf"{name}/(?:.*/)?{p}", spec) for name in self.frozen for p, spec in self.network(name).rules)
        return (*own, (rf"{NULL}/.*", ()))

    def init(self, key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, max(len(self.trained), 1))
        params = {}
        for name, own in zip(self.trained, keys, strict=False):
            ids = jnp.zeros((1, self.length(name)), jnp.int32)
            mask = (ids == 0,) if name in TRAINED else ()
            params[name] = self.network(name).init(own, ids, *mask)["params"]
        return params

    def constants(self) -> dict[str, Any]:
        """The weights of the frozen encoders, and what they make of "", as ShapeDtypeStructs; {} without one."""
        if not self.frozen:
            return {}
        trees = {}
        for name in self.frozen:
            ids = jax.ShapeDtypeStruct((1, self.length(name)), jnp.int32)
            trees[name] = jax.eval_shape(self.network(name).init, jax.random.key(0), ids)["params"]
        return trees | {NULL: jax.eval_shape(self.encode_empty, trees, {n: _spec(1, self.length(n)) for n in self.frozen})}

    def empty_tokens(self) -> dict[str, np.ndarray]:
        """{frozen encoder: int32[1, M]} of the text ""."""
        return {name: self._empty(name) for name in self.frozen}

    def _empty_tokens(self, rows: int) -> Requests:
        """{"tokens_<encoder>": int32[N, M]} of N empty texts."""
        return {TOKENS + name: np.repeat(self._empty(name), rows, axis=0) for name in self.used}

    def _empty(self, name: str) -> np.ndarray:
        """int32[1, M]: the tokens of "", which need no files: the end of the text, and CLIP's start before it."""
        if name in CLIPS:
            return tokens.padded([[clip_text.START]], self.length(name), clip_text.END, clip_pad(name))[0]
        return tokens.padded([[]], self.length(name), tokens.END, tokens.PAD)[0]

    def encode_empty(self, weights: Mapping[str, Any], ids: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
        """The entry NULL of the constants, of the frozen encoders' weights and `empty_tokens`."""
        parts = {name: self._encode(name, weights[name], ids[name])._asdict() for name in self.frozen}
        return {name: {key: x for key, x in part.items() if x is not None} for name, part in parts.items()}

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        spec = {TOKENS + name: jax.ShapeDtypeStruct((self.length(name),), jnp.int32) for name in self.used}
        if self.rates is not None:
            spec[PRESENT] = jax.ShapeDtypeStruct((len(self.encoders),), jnp.bool_)
        return spec

    @property
    def rates(self) -> tuple[float, ...] | None:
        """The dropout rate of each encoder; None if no encoder is dropped."""
        if not any(self.dropout):
            return None
        return self.dropout if len(self.dropout) > 1 else self.dropout * len(self.encoders)

    def cond_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        joined, widths = [name for name in self.encoders if name in CLIPS], {name: self._widths(name) for name in self.encoders}
        count = sum(self.length(name) for name in self.encoders if name not in joined[1:])
        width = max([sum(widths[name][0] for name in joined), *(widths[name][0] for name in self.encoders if name not in joined)])
        spec = {CONTEXT: jax.ShapeDtypeStruct((count, width), jnp.float32)}
        if self.mask:
            spec[MASK] = jax.ShapeDtypeStruct((count,), jnp.bool_)
        pooled = sum(widths[name][1] for name in self.encoders)
        return spec | ({POOLED: jax.ShapeDtypeStruct((pooled,), jnp.float32)} if self.pooled and pooled else {})

    def from_batch(self, params: Any, constants: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        parts = {}
        for name in self.used:
            weights = (constants if name in self.frozen else params)[name]
            parts[name] = self._encode(name, weights, batch[TOKENS + name])
        return self._joined(parts, batch.get(PRESENT))

    def _encode(self, name: str, weights: Any, ids: jax.Array) -> Part:
        network = self.network(name)
        if name in CLIPS:
            out = network.apply({"params": weights}, ids)
            ended = jnp.cumsum(ids == clip_text.END, axis=1)
            mask = ended - (ids == clip_text.END) == 0  # up to the first end
            pooled = out.pooled if name == "clip_l" else out.projected
            return Part(out.penultimate.astype(jnp.float32), pooled.astype(jnp.float32), mask)
        mask = ids != tokens.PAD
        if name in TRAINED:
            x = network.apply({"params": weights}, ids, mask)
            share = mask / mask.sum(1, keepdims=True)
            return Part(x, jnp.einsum("bm,bmc->bc", share, x), mask)
        x = network.apply({"params": weights}, ids, mask if self.mask else None)
        return Part(x.astype(jnp.float32), None, mask)

    def _joined(self, parts: Mapping[str, Part], present: jax.Array | None) -> dict[str, jax.Array]:
        """The condition, of the parts of the encoders that are not missing."""
        rows, width = len(next(iter(parts.values())).mask), self.cond_spec()[CONTEXT].shape[1]
        chosen: dict[str, Part] = {}
        for i, name in enumerate(self.encoders):
            part = parts.get(name) or self._zeros(name, rows)
            if present is not None:
                part = jax.tree.map(lambda x, i=i: jnp.where(_behind(present[:, i], x), x, jnp.zeros_like(x)), part)
            chosen[name] = part
        clips = [part for name, part in chosen.items() if name in CLIPS]
        others = [part for name, part in chosen.items() if name not in CLIPS]
        contexts, masks = [part.context for part in others], [part.mask for part in others]
        if clips:
            contexts.insert(0, jnp.concatenate([part.context for part in clips], axis=-1))
            masks.insert(0, jnp.stack([part.mask for part in clips]).any(0))
        cond = {CONTEXT: jnp.concatenate([_wide(x, width) for x in contexts], axis=1)}
        if self.mask:
            cond[MASK] = jnp.concatenate(masks, axis=1)
        pooled = [part.pooled for part in chosen.values() if part.pooled is not None]
        return cond | ({POOLED: jnp.concatenate(pooled, axis=-1)} if self.pooled and pooled else {})

    def _zeros(self, name: str, rows: int) -> Part:
        channels, of_pooled = self._widths(name)
        pooled = jnp.zeros((rows, of_pooled)) if of_pooled else None
        return Part(jnp.zeros((rows, self.length(name), channels)), pooled, jnp.zeros((rows, self.length(name)), bool))

    def null(self, params: Any, constants: Any, cond: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The encoding of ""; that of frozen encoders is in the constants."""
        return self.encoded_empty(params, constants, len(cond[CONTEXT]))

    def encoded_empty(self, params: Any, constants: Any, rows: int) -> dict[str, jax.Array]:
        """The condition of `rows` empty texts; of the constants it reads NULL alone."""
        parts = {}
        for name in self.used:
            if name in self.trained:
                parts[name] = self._encode(name, params[name], jnp.repeat(jnp.asarray(self._empty(name)), rows, axis=0))
            else:
                one = {key: jnp.repeat(x, rows, axis=0) for key, x in constants[NULL][name].items()}
                parts[name] = Part(one["context"], one.get("pooled"), one["mask"])
        return self._joined(parts, None)

    def from_requests(self, requests: Requests) -> Requests:
        """{"tokens_<encoder>": int32[N, M]} of "caption", and {"negative_tokens_<encoder>": ...} of "negative"."""
        if "label" in requests:
            raise UserError("the network is conditioned on text and cannot take labels; give a prompt")
        ready = {start + TOKENS + name for name in self.used for start in ("", NEGATIVE)}
        if unknown := sorted(requests.keys() - {"caption", "negative"} - ready):
            raise UserError(f"the network is conditioned on text and cannot take {', '.join(unknown)}; give a prompt")
        entries = {name: x for name, x in requests.items() if name in ready}
        for request, start in (("caption", ""), ("negative", NEGATIVE)):
            if request in requests:
                texts = _texts(requests[request], request)
                ids = self.tokenizer(texts) if any(texts) else self._empty_tokens(len(texts))  # these need no files
                entries |= {start + name: x for name, x in ids.items()}
        if lacking := [name for name in self.used if TOKENS + name not in entries]:
            raise UserError(f"the network is conditioned on text, and there is none for {', '.join(lacking)}; give a prompt")
        if len({len(x) for x in entries.values()}) > 1:
            counts = {name: len(x) for name, x in entries.items()}
            raise UserError(f"the numbers of prompts and of negative prompts differ: {counts}; give one of each for every image")
        return entries


@dataclass(frozen=True)
class EmptyText:
    """`Text` without the files of its frozen encoders: it has their stored encoding of "", and reads the empty text alone.

    A batch has "empty" int32[B], whose values do not count.

    Fields:
        text: the conditioner of the config.
    """

    text: Text

    num_classes = 0
    takes_text = True

    @property
    def rules(self) -> Rules:
        return self.text.rules

    @property
    def constant_rules(self) -> Rules:
        return ((rf"{NULL}/.*", ()),)

    def init(self, key: jax.Array) -> dict[str, Any]:
        return self.text.init(key)

    def constants(self) -> dict[str, Any]:
        return {NULL: self.text.constants()[NULL]}

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {EMPTY: jax.ShapeDtypeStruct((), jnp.int32)}

    def cond_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return self.text.cond_spec()

    def from_batch(self, params: Any, constants: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return self.text.encoded_empty(params, constants, len(batch[EMPTY]))

    def null(self, params: Any, constants: Any, cond: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return self.text.null(params, constants, cond)

    def from_requests(self, requests: Requests) -> Requests:
        """{"empty": int32[N]}.

        Raises:
            UserError: a text is not empty.
        """
        if EMPTY in requests:
            return {EMPTY: requests[EMPTY]}
        for what in ("caption", "negative"):
            if given := [text for text in _texts(requests.get(what, ()), what) if text]:
                names = self.text.frozen
                raise UserError(
                    f"the {what} {_short(given[0])} needs the text encoders {', '.join(names)}, which are not here; give "
                    f"{' and '.join(f'{flag}={names[0]}=<path>,...' for flag in ('--text_encoders', '--tokenizers'))} "
                    "(text_encoders= and tokenizers= of load), or draw without a text"
                )
        return {EMPTY: np.zeros(len(requests["caption"]), np.int32)}


def clip_pad(name: str) -> int:
    """The id of padding of a CLIP encoder: 0 for the bigG of Stable Diffusion, else the end."""
    return 0 if name == "clip_g" else clip_text.END


def _texts(given: Any, what: str) -> list[str]:
    """Texts of a request.

    Raises:
        UserError: it is one text, or holds something else.
    """
    if isinstance(given, str):
        raise UserError(f"the {what}s are one text, {_short(given)}; give a list, one text for each image")
    texts = [str(text) if isinstance(text, np.str_) else text for text in given]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise UserError(f"a {what} is {wrong[0]!r}; it must be a text")
    return texts


def _spec(rows: int, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, length), jnp.int32)


def _wide(x: jax.Array, width: int) -> jax.Array:
    """[B, M, width], filled with zeros."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, width - x.shape[-1])))


def _behind(rows: jax.Array, x: jax.Array) -> jax.Array:
    """[B] with axes of size 1 for the others of x."""
    return rows.reshape(-1, *(1,) * (x.ndim - 1))
