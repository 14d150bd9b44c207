"""Bytes as token ids and back: the 256 byte values themselves, or byte-level BPE (Sennrich et al. 2016; Radford et al.
2019, section 2.2) trained on the spot or read from a tokenizers JSON file. Nothing is downloaded.

A NUL byte, which no document holds, stands between two documents: it is the separator token, and counts as the one
byte that it is. So both kinds of tokens spell the same bytes, and their bits per byte can be compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt import corpus, store
from jaxgpt.config import BadInput

END = "<|endoftext|>"
# How tokenizers in the wild call the token between two documents, in order of preference.
ENDS = (END, "<|end_of_text|>", "<|endoftext>", "<eos>", "</s>", "[SEP]")
SMALLEST = 257  # every byte and the separator
# BPE is trained on at most this much text: its word counts live in memory, and more hardly changes the merges.
TRAINED_ON = 2**26
PIECE = 2**20  # most bytes of a document that are encoded as one text
TOGETHER = 2**22  # bytes of pieces that are encoded side by side: together they bound the memory
WHITE = b" \n\r\t"
# The bytes of UTF-8 text beside the NUL: Pythia's tokenizer, made from text, has no token for the 13 others.
IN_TEXT = frozenset([*range(1, 0xC0), *range(0xC2, 0xF5)])
NFC = {"type": "NFC"}


@dataclass(frozen=True)
class Tokenizer:
    """Ids of tokens. Equal ones compare equal and hash alike.

    json: what the tokenizers library reads; '' for bytes. separator: the id between two documents. spelled: the
    bytes of each id; a special token other than the separator, and an id that is not used, has none.
    """

    json: str = field(repr=False)
    separator: int
    spelled: tuple[bytes, ...] = field(compare=False, repr=False)
    engine: Any = field(compare=False, repr=False)

    @property
    def vocab_size(self) -> int:
        """Number of ids: each is below it."""
        return len(self.spelled)

    @property
    def sha256(self) -> str:
        """64 hex digits of the JSON text; '' for bytes."""
        return hashlib.sha256(self.json.encode()).hexdigest() if self.json else ""

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every id."""
        return np.min_scalar_type(self.vocab_size - 1)

    @property
    def bytes_V(self) -> np.ndarray:
        """How many bytes each id spells, int64."""
        return np.asarray([len(token) for token in self.spelled], np.int64)

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of a text: `decode` gives it back exactly. A NUL byte becomes the separator. Raises BadInput as
        `encode_parts` does.
        """
        first, *others = text.split(corpus.SEPARATOR)
        parts = [first, *(part for document in others for part in (corpus.SEPARATOR, document))]
        return np.concatenate([np.empty(0, self.dtype), *self.encode_parts(parts)])

    def encode_parts(self, parts: Iterable[Any]) -> Iterator[np.ndarray]:
        """The ids of documents and separators, as `corpus.stream` gives them, a few million bytes at a time.

        BPE raises BadInput for text that is not UTF-8, and for a tokenizer that loses a part of it. A document of more
        than PIECE bytes is encoded in pieces, so no token reaches over the border of two.
        """
        for group in _grouped(piece for part in parts for piece in pieces(part)):
            yield self._encode(group)

    def _encode(self, group: list[bytes]) -> np.ndarray:
        joined = b"".join(group)
        if self.engine is None:
            return np.frombuffer(joined, np.uint8)
        try:
            texts = [piece.decode() for piece in group if piece != corpus.SEPARATOR]
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise BadInput(f"text for a BPE tokenizer must be UTF-8 (byte 0x{byte:02x})") from None
        found = iter(self.engine.encode_batch_fast(texts, add_special_tokens=False))  # on all cores
        ids = [[self.separator] if piece == corpus.SEPARATOR else next(found).ids for piece in group]
        ids_n = np.concatenate([np.asarray(one, self.dtype) for one in ids])
        if self.decode(ids_n) != joined:
            raise BadInput(
                f"the tokenizer {self.sha256[:12]} does not give back the text that it encodes; it must be byte-level, "
                "without normalisation and special tokens within text"
            )
        return ids_n

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of ids, also where they are only a part of a UTF-8 character. Raises BadInput for unknown ids."""
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise BadInput(f"token ids must be from 0 to {self.vocab_size - 1}, not {ids.min()} to {ids.max()}")
        return b"".join([self.spelled[i] for i in ids.tolist()])


class Tokens(NamedTuple):
    """A corpus as token ids: its two streams, each [tokens] of the tokenizer's dtype."""

    train: np.ndarray
    validation: np.ndarray


BYTES = Tokenizer("", 0, tuple(bytes([value]) for value in range(256)), None)


def pieces(document: Any) -> Iterator[bytes]:
    """A document (bytes, or a file mapped into memory) in parts of at most PIECE bytes.

    A border stands before white space that follows something else, where words end anyway; in text that has none
    within half a piece, between two characters.
    """
    start = 0
    while start < len(document):
        end = min(start + PIECE, len(document))
        if end < len(document):
            part = bytes(document[start : end + 1])
            found = (
                at for at in range(len(part) - 1, PIECE // 2, -1) if part[at] in WHITE and part[at - 1] not in WHITE
            )
            at = next(found, 0)
            if not at:
                at = len(part) - 1
                while at > 1 and part[at] & 0xC0 == 0x80:  # inside a UTF-8 character
                    at -= 1
            end = start + at
        yield bytes(document[start:end])
        start = end


def _grouped(texts: Iterable[bytes]) -> Iterator[list[bytes]]:
    """The texts in groups of TOGETHER bytes or a little more; the last may be smaller."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= TOGETHER:
            yield group
            group, size = [], 0
    if group:
        yield group


# --- making one ----------------------------------------------------------------------------------------------------


def train(texts: Iterable[bytes], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens, the separator among them; fewer where the text has no more pairs.

    Made from the first TRAINED_ON bytes of the texts; a function of these, the number, and the tokenizers package.
    Words are cut as in GPT-2 (Radford et al. 2019). Raises BadInput for a `vocab_size` below SMALLEST and without
    the tokenizers package.
    """
    if vocab_size < SMALLEST:
        raise BadInput(f"a byte-level BPE of {vocab_size} tokens is not possible; it must have at least {SMALLEST}")
    library = _library()
    engine = library.Tokenizer(library.models.BPE())
    engine.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, special_tokens=[END], initial_alphabet=sorted(alphabet())
    )
    engine.train_from_iterator((piece.decode() for piece in _first(texts, TRAINED_ON)), trainer)
    return from_json(engine.to_str(), "the trained tokenizer")


def _first(texts: Iterable[bytes], most: int) -> Iterator[bytes]:
    """Pieces of the texts until `most` bytes are reached."""
    for text in texts:
        for piece in pieces(text):
            if most <= 0:
                return
            yield piece
            most -= len(piece)


def load(path: Path | str, name: str) -> Tokenizer:
    """The tokenizer of a JSON file of the tokenizers package, called `name` in messages.

    Raises BadInput as `from_json` does, and for a file that cannot be read.
    """
    try:
        return from_json(Path(path).expanduser().read_bytes().decode(), name)
    except UnicodeDecodeError:
        raise BadInput(f"{name} is not a tokenizers JSON file: it is not text") from None
    except OSError as error:
        raise BadInput(f"{name} cannot be read as a tokenizer: {error.strerror}") from None


def from_json(text: str, name: str) -> Tokenizer:
    """The tokenizer of a JSON text. Raises BadInput for one that is damaged, or does not give back text exactly.

    A normaliser must be absent or NFC, as Pythia's, and NFC is left out: text that is in this form, as nearly all is,
    has the same ids with it and without, and other text is given back exactly, in ids that NFC would not have made.
    A token that was added and is not special is text like any other. The JSON text is kept as it is.
    """

    def refuse(why: str) -> BadInput:
        return BadInput(f"{name} {why}")

    library = _library()
    try:
        tree = json.loads(text)
        normalised = isinstance(tree, dict) and tree.get("normalizer") == NFC
        engine = library.Tokenizer.from_str(json.dumps(tree | {"normalizer": None}) if normalised else text)
    except Exception as error:  # the library raises bare Exceptions
        raise refuse(f"is not a tokenizers JSON file: {error}") from None
    if tree.get("normalizer") not in (None, NFC):
        raise refuse("normalises text, so that it cannot be given back; `normalizer` must be null or NFC")
    if tree["model"].get("dropout"):
        raise refuse("encodes at random; `model.dropout` must be null")
    engine.no_padding()
    engine.no_truncation()
    engine.encode_special_tokens = True  # a document that writes "<|endoftext|>" does not end there
    added = {number: (token.content, token.special) for number, token in engine.get_added_tokens_decoder().items()}
    special = [content for content, is_special in added.values() if is_special]
    ends = [end for end in ENDS if end in special] or special
    if not ends or (len(special) > 1 and ends[0] not in ENDS):
        raise refuse(f"has no special token that ends a document; it must have one of {', '.join(ENDS)}")
    separator = engine.token_to_id(ends[0])
    spelled = {number: b"" if is_special else content.encode() for number, (content, is_special) in added.items()}
    byte_of = alphabet()
    try:
        for token, number in engine.get_vocab(with_added_tokens=True).items():
            if number not in spelled:
                spelled[number] = bytes(byte_of[character] for character in token)
    except KeyError as error:
        raise refuse(f"is not byte-level: a token holds {error.args[0]!r}, which stands for no byte") from None
    spelled[separator] = corpus.SEPARATOR
    missing = len({character for character, byte in byte_of.items() if byte in IN_TEXT} - set(engine.get_vocab()))
    if missing or not _is_byte_level(tree.get("pre_tokenizer")):
        raise refuse(
            f"is not byte-level: {f'{missing} bytes have no token' if missing else 'it must cut text by ByteLevel'}"
        )
    return Tokenizer(text, separator, tuple(spelled.get(number, b"") for number in range(max(spelled) + 1)), engine)


def _is_byte_level(node: Any) -> bool:
    """Whether a pre-tokenizer, or one in its sequence, turns bytes into the alphabet's characters and adds no space."""
    if not isinstance(node, dict):
        return False
    if node.get("type") == "Sequence":
        return any(map(_is_byte_level, node.get("pretokenizers", [])))
    return node.get("type") == "ByteLevel" and not node.get("add_prefix_space", True)


def alphabet() -> dict[str, int]:
    """The byte that each of the 256 characters of byte-level BPE stands for.

    A printable byte is its own character in Latin-1; the others are the characters from 256 on, in order (Radford et
    al. 2019, released code).
    """
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in own]
    return {chr(value): value for value in own} | {chr(256 + i): value for i, value in enumerate(others)}


# --- beside the runs -----------------------------------------------------------------------------------------------


def keep(tokenizer: Tokenizer, folder: Path | str) -> None:
    """Writes tokenizers/<sha256>.json into a sweep's folder, for whoever uses its models; nothing for bytes.

    Raises StoreError.
    """
    path = _kept(folder, tokenizer.sha256)
    if tokenizer.json and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise store.store_error(path.parent, error) from error
        store.write_bytes(path, tokenizer.json.encode())


def kept(folder: Path | str, identity: str) -> Tokenizer:
    """The tokenizer of a run in a sweep's folder, by the run's identity (`Source.identity`, a row's corpus_sha256).

    Raises BadInput for a file that is missing, damaged or not the one that the run was trained with.
    """
    _, _, sha256 = identity.partition("+")
    if not sha256:
        return BYTES
    path = _kept(folder, sha256)
    found = load(path, str(path))
    if found.sha256 != sha256:
        raise BadInput(f"{path} is damaged: its sha256 is {found.sha256}; put back the file that the sweep wrote")
    return found


def _kept(folder: Path | str, sha256: str) -> Path:
    return Path(folder) / "tokenizers" / f"{sha256}.json"


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise BadInput("a BPE tokenizer needs the tokenizers package: pip install 'jaxgpt[bpe]'") from None
    return tokenizers
