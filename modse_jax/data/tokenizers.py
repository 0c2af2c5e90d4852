"""Tokenizers: bytes to token ids and back, without loss.

Every tokenizer has ids for padding, the begin of a document and the end of a document. A tokenizer
is named by a string: "bytes", "sentencepiece:FILE", "hf:FILE" (a tokenizer.json of the Hugging Face
tokenizers library), or "sentencepiece" (trained on the source). A piece is the string or the bytes
that a token of the vocabulary stands for.
"""

import hashlib
import io
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import sentencepiece

from modse_jax.errors import UserError

KINDS = ("bytes", "sentencepiece", "hf")

TRAINED_ON_SOURCE = "sentencepiece"

TRAINING_LINE_BYTES = 16384  # a longer line is divided, because sentencepiece would leave it out

TRAINING_LINES = 40000  # train on this many lines, up to twice as many, or all if there are fewer

SPACE_MARK = "\u2581"  # the character that sentencepiece writes for a space

# Pieces that a trained model always has: line ends with the indentation after them. Without them,
# half of the tokens of source code would be white space.
LINE_END_PIECES = ["\n", "\n\n"] + ["\n" + SPACE_MARK * n for n in (2, 4, 8, 12, 16, 20, 24)]

# A text to test that a tokenizer loses nothing. Encoding and decoding changes it if the tokenizer
# normalizes text, drops spaces, adds a space in front, or has no byte fallback.
PROBE = (
    "x  two  spaces \r\n\ttab caf\u00e9 e\u0301 \ufb01 \u00bd \u4e16\u754c \U0001f600 \u2581 end "
).encode()

# A text for the stricter test of a tokenizer that is to prepare new data: white space at both ends,
# every ASCII character, and characters that normalizers remove or replace.
STRICT_PROBE = (
    " \n\t "
    + "".join(map(chr, range(128)))
    + "\u0085\u00ad\u00c9\u0130\u200b\u2028\ufeff\ufffd \n "
).encode()

# Bytes that occur in no UTF-8 text, so a tokenizer needs no pieces for them.
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}

Item = TypeVar("Item")


class Bytes:
    """One token per byte."""

    kind = "bytes"
    pad_id = 0
    bos_id = 1
    eos_id = 2
    vocab_size = 259

    def encode(self, text: bytes) -> np.ndarray:
        """Returns the token ids of a text."""
        return np.frombuffer(text, np.uint8).astype(np.int32) + 3

    def encode_batch(self, texts: list[bytes]) -> list[np.ndarray]:
        """Returns the token ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> bytes:
        """Returns the text of token ids, without special tokens."""
        return bytes(i - 3 for i in ids if 3 <= i < self.vocab_size)

    def serialize(self) -> bytes:
        """Returns the content of a tokenizer file."""
        return b"bytes"


class SentencePiece:
    """A sentencepiece model with byte fallback, for UTF-8 text.

    Raises:
        UserError: the model lacks a special piece, or decoding does not return the encoded text.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        self.vocab_size = self._processor.vocab_size()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(
                "the sentencepiece model lacks a bos or an eos piece (begin and end of a "
                "document); train one with modse_jax.data.train_tokenizer"
            )
        self.pad_id = self._processor.pad_id()
        if self.pad_id < 0:
            # Many models have no piece for padding. Padding is masked everywhere, so any id does.
            self.pad_id = self.eos_id
        self._special_ids = {self.pad_id, self.bos_id, self.eos_id}
        if self.decode(self.encode(PROBE)) != PROBE:
            raise UserError(
                "the sentencepiece model loses text (it normalizes, drops spaces or has no byte "
                "fallback), so bits per byte would be wrong; train one with "
                "modse_jax.data.train_tokenizer"
            )

    def encode(self, text: bytes) -> np.ndarray:
        """Returns the token ids of a text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[bytes]) -> list[np.ndarray]:
        """Returns the token ids of each text, computed on all cores.

        sentencepiece writes spaces as SPACE_MARK. A text that holds this character is split at it,
        and the character is encoded as its three bytes.
        """
        mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        sections_of_texts = [text.decode("utf-8").split(SPACE_MARK) for text in texts]
        all_sections = [section for sections in sections_of_texts for section in sections]
        encoded = iter(self._processor.encode(all_sections, num_threads=os.cpu_count()))
        result = []
        for sections in sections_of_texts:
            ids = list(next(encoded))
            for _ in sections[1:]:
                ids += mark_ids + next(encoded)
            result.append(np.array(ids, np.int32))
        return result

    def decode(self, ids: Iterable[int]) -> bytes:
        """Returns the text of token ids, without special tokens.

        The bytes of the pieces are concatenated. If the ids end within a character of several
        bytes, sentencepiece's own decoding would replace its bytes.
        """
        pieces = []
        for token in ids:
            if token not in self._special_ids and token < self.vocab_size:
                pieces.append(self._decode_piece(int(token)))
        return b"".join(pieces)

    def _decode_piece(self, token: int) -> bytes:
        piece = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # <0xAB>
        return piece.replace(SPACE_MARK, " ").encode("utf-8")

    def literal_pieces(self) -> list[str]:
        """Returns texts that the tokenizer might treat in a special way."""
        return [self._processor.id_to_piece(token) for token in sorted(self._special_ids)]

    def serialize(self) -> bytes:
        """Returns the content of a tokenizer file."""
        return self._model


class HuggingFace:
    """A tokenizer of the Hugging Face library (tokenizer.json) with byte-level pieces.

    Padding, begin and end tokens that it lacks are added to its vocabulary.

    Raises:
        UserError: the tokenizer lacks a piece for some byte, or decoding does not return the
            encoded text.
    """

    kind = "hf"

    PAD_NAMES = ("<pad>", "[PAD]", "<|padding|>", "<|pad|>")
    BOS_NAMES = ("<bos>", "<s>", "<|begin_of_text|>")
    EOS_NAMES = ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>")

    def __init__(self, model: bytes):
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_buffer(model)
        self.pad_id = self._find_or_add_special(self.PAD_NAMES)
        self.bos_id = self._find_or_add_special(self.BOS_NAMES)
        self.eos_id = self._find_or_add_special(self.EOS_NAMES)
        self._special_ids = {self.pad_id, self.bos_id, self.eos_id}
        # A text that contains the name of a special token is encoded as text.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Ids may have gaps; the rows of unused ids are in the embedding, but in no text.
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        # The names of these are text, while those of others are bytes in the byte-level alphabet.
        self._added_tokens = {
            token: added.content
            for token, added in self._tokenizer.get_added_tokens_decoder().items()
        }
        self._model = self._tokenizer.to_str().encode()
        self._check_lossless()

    def _find_or_add_special(self, names: tuple[str, ...]) -> int:
        """Returns the id of a special token that may have any of these names.

        If none of the names is in the vocabulary, the first one is added.
        """
        for name in names:
            found = self._tokenizer.token_to_id(name)
            if found is not None:
                return found
        self._tokenizer.add_special_tokens([names[0]])
        added = self._tokenizer.token_to_id(names[0])
        assert added is not None
        return added

    def _check_lossless(self) -> None:
        num_missing = 0
        for character, byte in BYTE_OF_CHARACTER.items():
            is_missing = self._tokenizer.token_to_id(character) is None
            num_missing += is_missing and byte not in NEVER_IN_UTF8
        if num_missing:
            raise UserError(
                f"the tokenizer lacks pieces for {num_missing} of the 256 bytes; train one with "
                "modse_jax.data.train_tokenizer --kind=hf"
            )
        special_names = [*self.PAD_NAMES, *self.BOS_NAMES, *self.EOS_NAMES]
        probe = PROBE + " ".join(special_names).encode()
        if self.decode(self.encode(probe)) != probe:
            raise UserError(
                "the tokenizer loses text (it normalizes, adds or drops spaces, or is not "
                "byte-level), so bits per byte would be wrong; train one with "
                "modse_jax.data.train_tokenizer --kind=hf"
            )

    def encode(self, text: bytes) -> np.ndarray:
        """Returns the token ids of a text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[bytes]) -> list[np.ndarray]:
        """Returns the token ids of each text, computed on all cores."""
        decoded = [text.decode("utf-8") for text in texts]
        encoded = self._tokenizer.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encoded]

    def decode(self, ids: Iterable[int]) -> bytes:
        """Returns the text of token ids, without special tokens.

        The bytes of the pieces are concatenated. If the ids end within a character of several
        bytes, the library's own decoding would replace its bytes.
        """
        pieces = []
        for token in ids:
            if token not in self._special_ids and token < self.vocab_size:
                pieces.append(self._decode_piece(int(token)))
        return b"".join(pieces)

    def _decode_piece(self, token: int) -> bytes:
        if token in self._added_tokens:
            return self._added_tokens[token].encode()
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if all(character in BYTE_OF_CHARACTER for character in piece):
            return bytes(BYTE_OF_CHARACTER[character] for character in piece)
        return piece.encode()

    def literal_pieces(self) -> list[str]:
        """Returns texts that the tokenizer might treat in a special way."""
        return sorted(self._added_tokens.values())

    def serialize(self) -> bytes:
        """Returns the content of a tokenizer file."""
        return self._model


def _byte_level_alphabet() -> dict[str, int]:
    """Returns {character: byte}: how byte-level tokenizers write a byte as a character (GPT-2).

    A printable byte is written as the character with the same code point. The other bytes are
    written as the characters with code points from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    for index, byte in enumerate(others):
        alphabet[chr(256 + index)] = byte
    return alphabet


BYTE_OF_CHARACTER = _byte_level_alphabet()

Tokenizer = Bytes | SentencePiece | HuggingFace


def load(spec: str) -> Tokenizer:
    """Returns the tokenizer that a string names.

    Raises:
        UserError: the kind is unknown, the file is missing or invalid, or decoding does not return
            the encoded text.
    """
    tokenizer = read(spec)
    _check_strictly(tokenizer, spec)
    return tokenizer


def read(spec: str) -> Tokenizer:
    """Returns the tokenizer that a string names, also if older versions have accepted it only.

    Raises:
        UserError: the kind is unknown, or the file is missing or invalid.
    """
    kind, _, file = spec.partition(":")
    if kind == "bytes" and not file:
        return Bytes()
    if kind not in ("sentencepiece", "hf") or not file:
        raise UserError(
            f"tokenizer {spec!r} must be bytes, sentencepiece:FILE, hf:FILE or sentencepiece"
        )
    path = pathlib.Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"tokenizer file {path} does not exist")
    return deserialize(kind, path.read_bytes(), str(path))


def _check_strictly(tokenizer: Tokenizer, spec: str) -> None:
    """Raises UserError if a tokenizer loses white space or the text around one of its own pieces.

    Prepared data is opened without this check, because older versions did not have it.
    """
    if isinstance(tokenizer, Bytes):
        return
    pieces = "".join(f" \t{piece}\n  {piece}" for piece in tokenizer.literal_pieces())
    for probe in (STRICT_PROBE, pieces.encode() + STRICT_PROBE):
        if tokenizer.decode(tokenizer.encode(probe)) != probe:
            raise UserError(
                f"tokenizer {spec} loses text, such as white space at the ends of a text or around "
                "an added token (its normalizer, or lstrip and rstrip of added tokens), so bits "
                "per byte would be wrong; train one with modse_jax.data.train_tokenizer"
            )


def deserialize(kind: str, model: bytes, name: str) -> Tokenizer:
    """Returns the tokenizer of a serialized model.

    Args:
        kind: "bytes", "sentencepiece" or "hf".
        model: content of the tokenizer file.
        name: the file, for error messages.

    Raises:
        UserError: the model is invalid.
    """
    if kind == "bytes":
        return Bytes()
    try:
        return SentencePiece(model) if kind == "sentencepiece" else HuggingFace(model)
    except UserError:
        raise
    except Exception:  # the libraries raise many types; all of them mean an invalid file
        expected = "sentencepiece model" if kind == "sentencepiece" else "tokenizer.json"
        raise UserError(f"{name} is not a {expected}") from None


def fingerprint(tokenizer: Tokenizer) -> str:
    """Returns a text that identifies a tokenizer: its kind and a hash of its serialized model."""
    return f"{tokenizer.kind}:{hashlib.sha256(tokenizer.serialize()).hexdigest()[:16]}"


def train_sentencepiece(documents: Iterable[bytes], vocab_size: int) -> SentencePiece:
    """Trains a BPE model with byte fallback and without normalization, so that it is lossless.

    Pieces may combine letters and punctuation ("self."), which gives 6% fewer tokens on Python
    source. The result is deterministic.

    Raises:
        UserError: sentencepiece cannot train so many pieces on the documents.
    """
    lines = thin_out(
        (piece for text in documents for piece in _split_into_lines(text)), TRAINING_LINES
    )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
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
            user_defined_symbols=LINE_END_PIECES,
            max_sentence_length=TRAINING_LINE_BYTES,
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
    return SentencePiece(model.getvalue())


def _split_into_lines(text: bytes) -> Iterator[str]:
    """Yields the lines of a text that are not empty, longer ones in pieces.

    A piece has at most TRAINING_LINE_BYTES. It ends in front of a space, or between two characters
    if the line has no space.
    """
    for line in text.split(b"\n"):
        while len(line) > TRAINING_LINE_BYTES:
            end = line.rfind(b" ", 1, TRAINING_LINE_BYTES + 1)
            if end < 0:
                end = TRAINING_LINE_BYTES
                while line[end] & 0xC0 == 0x80:  # within a UTF-8 character
                    end -= 1
            yield line[:end].decode("utf-8")
            line = line[end:]
        if line:
            yield line.decode("utf-8")


def train_hf(documents: Iterable[bytes], vocab_size: int) -> HuggingFace:
    """Trains a byte-level BPE tokenizer like that of GPT-2, with one token per digit.

    It is lossless, and the result is deterministic.
    """
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special_tokens = [
        HuggingFace.PAD_NAMES[0],
        HuggingFace.BOS_NAMES[0],
        HuggingFace.EOS_NAMES[0],
    ]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    lines = thin_out(
        (line for text in documents for line in text.decode("utf-8").splitlines(keepends=True)),
        TRAINING_LINES,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return HuggingFace(tokenizer.to_str().encode())


def thin_out(items: Iterable[Item], limit: int) -> list[Item]:
    """Returns a sample of evenly spaced items, in one pass over them.

    It has between `limit` and 2 * `limit` items, or all if there are fewer. sentencepiece could
    draw a sample itself, but that differs from process to process.
    """
    sample = []
    stride = 1
    for number, item in enumerate(items):
        if number % stride == 0:
            sample.append(item)
            if len(sample) > 2 * limit:
                sample = sample[::2]
                stride *= 2
    return sample
