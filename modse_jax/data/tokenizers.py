"""Bytes to token ids and back, exactly. Every tokenizer has pad, document-begin and document-end ids.

A tokenizer is named by a string: "bytes", "sentencepiece:FILE", "hf:FILE" (a tokenizer.json of the tokenizers library),
or "sentencepiece" (train one on the source).
"""

import hashlib
import io
import os
import pathlib
from collections.abc import Iterable

import numpy as np
import sentencepiece

from modse_jax.errors import UserError

KINDS = ("bytes", "sentencepiece", "hf")


SAMPLED_LINES = 40000


# Line ends and the indent after them as single pieces: otherwise half of a program's tokens are white space.
SYMBOLS = ["\n", "\n\n"] + ["\n" + "\u2581" * spaces for spaces in (2, 4, 8, 12, 16, 20, 24)]


# What normalisation, dropped spaces, a dummy prefix or missing byte fallback would change.
PROBE = "x  two  spaces \r\n\ttab caf\u00e9 e\u0301 \ufb01 \u00bd \u4e16\u754c \U0001f600 \u2581 end ".encode()


class Bytes:
    """One token per byte."""

    kind, pad_id, bos_id, eos_id, vocab_size = "bytes", 0, 1, 2, 259

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(np.int32) + 3

    def encode_batch(self, texts: list[bytes]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> bytes:
        return bytes(i - 3 for i in ids if 3 <= i < self.vocab_size)

    def serialized(self) -> bytes:
        return b"bytes"


class SentencePiece:
    """A sentencepiece model with byte fallback. Its text must be UTF-8; decoding gives back the same bytes."""

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        self._model, self._processor = (
            model,
            sentencepiece.SentencePieceProcessor(model_proto=model),
        )
        p = self._processor
        self.pad_id, self.bos_id, self.eos_id, self.vocab_size = (
            p.pad_id(),
            p.bos_id(),
            p.eos_id(),
            p.vocab_size(),
        )
        if min(self.pad_id, self.bos_id, self.eos_id) < 0:
            raise UserError(
                "the sentencepiece model lacks a pad, bos or eos piece; train one with "
                "modse_jax.data.train_tokenizer"
            )
        self._special = {self.pad_id, self.bos_id, self.eos_id}
        if self.decode(self.encode(PROBE)) != PROBE:
            raise UserError(
                "the sentencepiece model loses text (it normalises, drops spaces or has no byte fallback), "
                "so bits per byte would be wrong; train one with modse_jax.data.train_tokenizer"
            )

    def encode(self, text: bytes) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[bytes]) -> list[np.ndarray]:
        """Token ids of each text, over all cores."""
        mark = "\u2581"  # sentencepiece's own sign for a space: where a text holds one, it is spelt in bytes
        spelt = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in mark.encode()]
        parts = [text.decode("utf-8").split(mark) for text in texts]
        flat = self._processor.encode(
            [part for split in parts for part in split], num_threads=os.cpu_count()
        )
        out, start = [], 0
        for split in parts:
            ids = list(flat[start])
            for more in flat[start + 1 : start + len(split)]:
                ids += spelt + more
            out.append(np.array(ids, np.int32))
            start += len(split)
        return out

    def decode(self, ids: Iterable[int]) -> bytes:
        ids = [int(i) for i in ids if i not in self._special and i < self.vocab_size]
        # As pieces, not as text: text would replace a byte sequence that is cut in the middle of a character.
        pieces = (self._processor.id_to_piece(i) for i in ids)
        return b"".join(
            bytes([int(piece[3:5], 16)])
            if self._processor.is_byte(i)
            else piece.replace("\u2581", " ").encode("utf-8")
            for i, piece in zip(ids, pieces)
        )

    def serialized(self) -> bytes:
        return self._model


class HuggingFace:
    """A tokenizer.json with byte-level pieces. What it lacks of pad, begin and end is added to its vocabulary."""

    kind = "hf"
    NAMES = (
        ("pad_id", ("<pad>", "[PAD]", "<|padding|>", "<|pad|>")),
        ("bos_id", ("<bos>", "<s>", "<|begin_of_text|>")),
        ("eos_id", ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>")),
    )

    def __init__(self, model: bytes):
        import tokenizers

        self._tokenizer = t = tokenizers.Tokenizer.from_buffer(model)
        for name, spellings in self.NAMES:
            found = [s for s in spellings if t.token_to_id(s) is not None]
            if not found:
                t.add_special_tokens([spellings[0]])
            setattr(self, name, t.token_to_id((found or spellings)[0]))
        t.encode_special_tokens = True  # a text that spells "<pad>" is text
        t.no_truncation()
        t.no_padding()
        self.vocab_size, self._model = t.get_vocab_size(), t.to_str().encode()
        self._special = {self.pad_id, self.bos_id, self.eos_id}
        missing = [
            c for c, b in BYTE_OF.items() if t.token_to_id(c) is None and b not in NEVER_IN_UTF8
        ]
        if missing or max(t.get_vocab().values()) >= self.vocab_size:
            raise UserError(
                f"the tokenizer lacks pieces for {len(missing)} of the 256 bytes, or its ids have gaps; "
                "train one with modse_jax.data.train_tokenizer --kind=hf"
            )
        probe = PROBE + b" ".join(s.encode() for _, spellings in self.NAMES for s in spellings)
        if self.decode(self.encode(probe)) != probe:
            raise UserError(
                "the tokenizer loses text (it normalises, adds or drops spaces, or is not byte-level), so "
                "bits per byte would be wrong; train one with modse_jax.data.train_tokenizer --kind=hf"
            )

    def encode(self, text: bytes) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[bytes]) -> list[np.ndarray]:
        """Token ids of each text, over all cores."""
        encoded = self._tokenizer.encode_batch_fast(
            [t.decode("utf-8") for t in texts], add_special_tokens=False
        )
        return [np.array(e.ids, np.int32) for e in encoded]

    def decode(self, ids: Iterable[int]) -> bytes:
        # By pieces, not as text: text would replace a byte sequence that is cut in the middle of a character.
        pieces = (
            self._tokenizer.id_to_token(int(i))
            for i in ids
            if i not in self._special and i < self.vocab_size
        )
        return b"".join(
            bytes(BYTE_OF[c] for c in piece) if all(c in BYTE_OF for c in piece) else piece.encode()
            for piece in pieces
            if piece is not None
        )

    def serialized(self) -> bytes:
        return self._model


def _byte_level():
    """{sign: byte} of the byte-level alphabet that GPT-2 introduced: printable bytes stand for themselves, the others
    for signs from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_level()


NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


Tokenizer = Bytes | SentencePiece | HuggingFace


def load(spec: str) -> Tokenizer:
    """The tokenizer of a spec; UserError for an unknown kind or an unusable file."""
    kind, _, file = spec.partition(":")
    if kind == "bytes" and not file:
        return Bytes()
    if kind not in KINDS[1:] or not file:
        raise UserError(
            f"tokenizer {spec!r} must be bytes, sentencepiece:FILE, hf:FILE or sentencepiece"
        )
    path = pathlib.Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"tokenizer file {path} does not exist")
    return from_serialized(kind, path.read_bytes(), str(path))


def from_serialized(kind: str, model: bytes, name: str) -> Tokenizer:
    if kind == "bytes":
        return Bytes()
    try:
        return SentencePiece(model) if kind == "sentencepiece" else HuggingFace(model)
    except UserError:
        raise
    except Exception:  # whatever the library raises
        raise UserError(
            f"{name} is not a {'sentencepiece model' if kind == 'sentencepiece' else 'tokenizer.json'}"
        ) from None


def fingerprint(tokenizer: Tokenizer) -> str:
    """Kind and hash of the model file: equal for equal tokenizers, wherever the file lies."""
    return f"{tokenizer.kind}:{hashlib.sha256(tokenizer.serialized()).hexdigest()[:16]}"


def train_sentencepiece(documents: Iterable[bytes], vocab_size: int) -> SentencePiece:
    """A BPE model with byte fallback and nothing normalised, so that every text comes back exactly.

    Pieces may join letters and punctuation ("self."): 6% fewer tokens on Python source. Deterministic for equal input.
    """
    lines = _thin(
        (line for text in documents for line in text.decode("utf-8").split("\n") if line),
        SAMPLED_LINES,
    )
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            split_by_unicode_script=False,
            user_defined_symbols=SYMBOLS,
            max_sentence_length=16384,
            shuffle_input_sentence=False,
            hard_vocab_limit=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"sentencepiece could not train {vocab_size} pieces on this source: {error}"
        ) from None
    return SentencePiece(out.getvalue())


def train_hf(documents: Iterable[bytes], vocab_size: int) -> HuggingFace:
    """A byte-level BPE that loses nothing, as GPT-2's, with digits apart. Deterministic for equal input."""
    import tokenizers

    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    t.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[spellings[0] for _, spellings in HuggingFace.NAMES],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    lines = (line for text in documents for line in text.decode("utf-8").splitlines(keepends=True))
    lines = _thin(lines, SAMPLED_LINES)
    t.train_from_iterator(lines, trainer)
    return HuggingFace(t.to_str().encode())


def _thin(lines, limit):
    """Evenly spaced lines in one pass: all, or between `limit` and twice as many. Our own sample, since sentencepiece
    draws another one in every process."""
    kept, stride = [], 1
    for number, line in enumerate(lines):
        if number % stride == 0:
            kept.append(line)
            if len(kept) > 2 * limit:
                kept, stride = kept[::2], 2 * stride
    return kept
