"""Tokenizers: text comes back exactly, ids are spelled as the library spells them, training depends on text alone."""

import json
import os
import random
import subprocess
import sys
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import tokenizer
from jaxgpt.config import BadInput
from jaxgpt.tokenizer import BYTES

library = pytest.importorskip("tokenizers")
ROOT = Path(__file__).parents[1]
TEXTS = [
    b"def mean(values):\n    return sum(values) / len(values)\n",
    "naïve café, 25 €; 𝄞 and 日本語\n".encode(),
    b"the cat sat on the mat; the dog sat on the log\n" * 3,
    b"x = [i ** 2 for i in range(10)]\n\n\n    y = x\n",
]


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train(TEXTS, 330)


def edited(tokenizer_json, **changes):
    return json.dumps(json.loads(tokenizer_json) | changes)


# --- there and back ------------------------------------------------------------------------------------------------


WORDS = st.sampled_from(["the", "sat", " ", "\n", "\0", "é", "<|endoftext|>"])
ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=40) | st.lists(WORDS, max_size=30).map("".join)


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
def test_any_text_comes_back_exactly_and_each_id_says_how_many_bytes_it_is(bpe, text):
    data = text.encode()
    for made in (bpe, BYTES):
        ids = made.encode(data)
        assert made.decode(ids) == data
        assert made.bytes_V[ids].sum() == len(data)
        assert (ids == made.separator).sum() == data.count(b"\0")


def test_text_that_spells_the_end_token_is_text_and_ends_nothing(bpe):
    ids = bpe.encode(tokenizer.END.encode())
    assert bpe.separator not in ids
    assert bpe.decode(ids) == tokenizer.END.encode()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20), min_size=1, max_size=5))
def test_a_stream_is_its_documents_one_by_one_with_separators_between(bpe, documents):
    expected = bpe.encode(documents[0].encode()).tolist()
    for document in documents[1:]:
        expected += [bpe.separator, *bpe.encode(document.encode()).tolist()]
    assert bpe.encode("\0".join(documents).encode()).tolist() == expected


def test_ids_are_those_that_the_library_gives_and_its_decoder_agrees(bpe):
    engine = library.Tokenizer.from_str(bpe.json)
    for text in TEXTS:
        ids = engine.encode(text.decode()).ids
        assert bpe.encode(text).tolist() == ids
        assert bpe.decode(ids).decode() == engine.decode(ids) == text.decode()


def test_the_alphabet_is_the_librarys():
    ours = tokenizer.alphabet()
    assert sorted(ours) == sorted(library.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(ours.values()) == list(range(256))
    cut = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # All bytes that UTF-8 text can hold but NUL: 127, 64 that continue a character, 51 that begin one.
    spans = [range(1, 0x800), range(0x800, 0xD800, 61), range(0xE000, 0x10000, 61), range(0x10000, 0x110000, 4001)]
    characters = [chr(i) for span in spans for i in span]
    seen = {}
    for character in characters:
        ((spelled, _),) = cut.pre_tokenize_str(character)
        seen |= dict(zip(spelled, character.encode(), strict=True))
    assert len(seen) == 127 + 64 + 51
    assert set(seen.values()) == tokenizer.IN_TEXT
    assert all(ours[character] == byte for character, byte in seen.items())


def test_parts_of_a_character_decode_to_their_bytes_so_that_sampling_can_stream(bpe):
    text = "日€𝄞".encode()
    ids = bpe.encode(text)
    assert len(ids) > 3
    assert b"".join(bpe.decode([i]) for i in ids) == text
    assert bpe.decode(ids[:1]) == text[: len(bpe.decode(ids[:1]))]
    assert bpe.decode([]) == b""


def test_ids_have_the_smallest_type_that_holds_them(bpe):
    assert (BYTES.vocab_size, BYTES.dtype, bpe.vocab_size, bpe.dtype) == (256, np.uint8, 330, np.uint16)
    assert bpe.encode(b"").dtype == bpe.encode(b"ab").dtype == np.uint16
    large = json.loads(bpe.json)
    large["model"]["vocab"]["aa"] = 70000
    wide = tokenizer.from_json(json.dumps(large), "wide")
    assert (wide.vocab_size, wide.dtype) == (70001, np.uint32)
    assert wide.decode([70000, 69000, 70000]) == b"aaaa"


def test_a_long_document_is_encoded_in_pieces_that_end_where_words_do(bpe, monkeypatch):
    text = " ".join(f"word{i}\n  and" for i in range(300)).encode()
    whole = bpe.encode(text)
    for piece, together in ((64, 200), (200, 64), (16, 10**6)):
        monkeypatch.setattr(tokenizer, "PIECE", piece)
        monkeypatch.setattr(tokenizer, "TOGETHER", together)
        cut = list(tokenizer.pieces(text))
        assert b"".join(cut) == text
        assert max(map(len, cut)) <= piece
        assert all(part[:1] in (b" ", b"\n") and before[-1:] not in (b" ", b"\n")
                   for before, part in pairwise(cut))  # fmt: skip
        np.testing.assert_array_equal(bpe.encode(text), whole)


@settings(max_examples=100, deadline=None)
@given(st.text("aé€𝄞 \n", max_size=80))
def test_pieces_never_cut_a_character(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "PIECE", 8)
        cut = list(tokenizer.pieces(text.encode()))
    assert "".join(piece.decode() for piece in cut) == text
    assert all(0 < len(piece) <= 8 for piece in cut)


# --- training ------------------------------------------------------------------------------------------------------


def test_training_gives_the_size_asked_for_or_fewer_where_the_text_has_no_more_pairs(bpe):
    assert bpe.vocab_size == 330
    assert tokenizer.train([b"abab"], 1000).vocab_size == 257 + 2  # ab, abab
    assert tokenizer.train([b"a"], 257).vocab_size == 257
    assert sorted(bpe.spelled)[:2] == [b"\0", b"\0"]  # the separator, and the byte itself
    assert sorted({*bpe.spelled} & {bytes([i]) for i in range(256)}) == [bytes([i]) for i in range(256)]


def test_frequent_pairs_become_tokens(bpe):
    assert len(bpe.encode(TEXTS[2])) < 0.6 * len(TEXTS[2])
    assert b" the" in bpe.spelled


def test_the_order_of_the_texts_does_not_matter(bpe):
    shuffled = list(TEXTS)
    random.Random(1).shuffle(shuffled)
    assert shuffled != TEXTS
    assert tokenizer.train(shuffled, 330) == bpe


@pytest.mark.parametrize("threads", ["1", "3"])
def test_another_process_with_other_threads_trains_the_same_tokenizer(bpe, threads):
    code = f"from jaxgpt import tokenizer; print(tokenizer.train({TEXTS!r}, 330).sha256)"
    environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert done.stdout.decode().strip() == bpe.sha256


def test_training_reads_no_more_than_its_share_of_the_texts(monkeypatch):
    monkeypatch.setattr(tokenizer, "TRAINED_ON", 4000)
    monkeypatch.setattr(tokenizer, "PIECE", 1000)
    read = []

    def texts():
        for i in range(100):
            read.append(i)
            yield b"the same words\n" * 60 if i < 5 else b"zyzyzyzy " * 100

    made = tokenizer.train(texts(), 300)
    assert len(read) <= 6
    assert not [token for token in made.spelled if b"zy" in token]


def test_fewer_tokens_than_bytes_are_refused():
    with pytest.raises(BadInput, match="a byte-level BPE of 256 tokens is not possible; it must have at least 257"):
        tokenizer.train(TEXTS, 256)


# --- equal tokenizers ----------------------------------------------------------------------------------------------


def test_a_tokenizer_read_from_its_json_is_equal_and_hashes_alike(bpe):
    again = tokenizer.from_json(bpe.json, "again")
    assert again == bpe != BYTES
    assert hash(again) == hash(bpe)
    assert (again.spelled, again.sha256, len(again.sha256), BYTES.sha256) == (bpe.spelled, bpe.sha256, 64, "")


# --- files ---------------------------------------------------------------------------------------------------------


def test_what_is_kept_beside_the_runs_is_found_by_their_identity(bpe, tmp_path):
    tokenizer.keep(bpe, tmp_path)
    tokenizer.keep(bpe, tmp_path)
    tokenizer.keep(BYTES, tmp_path)
    assert [path.name for path in (tmp_path / "tokenizers").iterdir()] == [f"{bpe.sha256}.json"]
    assert tokenizer.kept(tmp_path, f"{'0' * 64}+{bpe.sha256}") == bpe
    assert tokenizer.kept(tmp_path, "0" * 64) is BYTES


def test_a_kept_tokenizer_that_is_missing_or_changed_is_refused(bpe, tmp_path):
    with pytest.raises(BadInput, match=r"abc\.json cannot be read as a tokenizer: No such file"):
        tokenizer.kept(tmp_path, "0+abc")
    tokenizer.keep(bpe, tmp_path)
    path = tmp_path / "tokenizers" / f"{bpe.sha256}.json"
    path.write_text(bpe.json + " ")
    with pytest.raises(BadInput, match="is damaged: its sha256 is"):
        tokenizer.kept(tmp_path, f"0+{bpe.sha256}")


def gpt2_like():
    """As GPT-2's file: special token last, in the model's vocabulary too, a post-processor; merges of our own."""
    engine = library.Tokenizer(library.models.BPE())
    engine.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder, engine.post_processor = library.decoders.ByteLevel(), library.processors.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet()
    )
    engine.train_from_iterator([text.decode() for text in TEXTS], trainer)
    engine.add_special_tokens(["<|endoftext|>"])
    tree = json.loads(engine.to_str())
    tree["model"]["vocab"]["<|endoftext|>"] = 300
    return library.Tokenizer.from_str(json.dumps(tree))


def pythia_like(**changes):
    """JSON as Pythia's (GPT-NeoX-20B's): NFC, special tokens first, no token for the bytes that UTF-8 text cannot
    hold, and 23 runs of spaces that were added behind the merges and are not special.
    """
    engine = library.Tokenizer(library.models.BPE())
    engine.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder, engine.post_processor = library.decoders.ByteLevel(), library.processors.ByteLevel()
    byte_of = tokenizer.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=sorted(c for c, byte in byte_of.items() if byte not in (0xC0, 0xC1, *range(0xF5, 0x100))),
    )
    engine.train_from_iterator([*(text.decode() for text in TEXTS), "caf\u00e9 " * 5], trainer)
    tree = json.loads(engine.to_str())
    assert (len(tree["model"]["vocab"]), tree["model"]["vocab"]["Ċ"]) == (300, 187)  # as in the original
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    tree["added_tokens"] += [{"id": 300 + i, "content": " " * (24 - i), **plain} for i in range(23)]
    return json.dumps(tree | {"normalizer": {"type": "NFC"}} | changes)


def test_a_file_as_gpt2s_is_read_with_its_own_separator(tmp_path):
    gpt2_like().save(str(tmp_path / "tokenizer.json"))
    read = tokenizer.load(tmp_path / "tokenizer.json", "gpt2")
    assert (read.separator, read.vocab_size) == (300, 301)
    assert read.encode(b"the\0the").tolist()[len(read.encode(b"the"))] == 300
    assert read.decode(read.encode(b"the\0 cat")) == b"the\0 cat"


def test_a_file_as_pythias_is_read_and_gives_the_ids_of_the_library():
    made = pythia_like()
    read, engine = tokenizer.from_json(made, "pythia"), library.Tokenizer.from_str(made)
    assert (read.separator, read.vocab_size, read.json) == (0, 323, made)
    assert read.spelled[1] == b""  # <|padding|>
    assert read.spelled[300:] == tuple(b" " * n for n in range(24, 1, -1))
    spaced = ["a" + " " * 30 + "b", "   ", " x  \n     y", "caf\u00e9\tcaf\u00e9"]
    for text in [*(text.decode() for text in TEXTS), *spaced]:
        assert unicodedata.is_normalized("NFC", text)
        ids = read.encode(text.encode())
        assert ids.tolist() == engine.encode(text).ids
        assert read.decode(ids) == text.encode()
    assert read.encode(b"a" + b" " * 30 + b"b").tolist()[1:3] == [300, 318]  # 24 + 6
    assert read.encode(b"the\0  the")[len(read.encode(b"the")) :][:2].tolist() == [0, 322]


def test_text_that_nfc_would_change_comes_back_exactly_in_other_ids():
    made = pythia_like()
    read, engine = tokenizer.from_json(made, "pythia"), library.Tokenizer.from_str(made)
    text = "cafe\u0301"
    assert read.decode(read.encode(text.encode())) == text.encode()
    assert engine.encode(text).ids == engine.encode("caf\u00e9").ids == read.encode("caf\u00e9".encode()).tolist()
    assert read.encode(text.encode()).tolist() != engine.encode(text).ids


@cache
def read_pythia():
    return tokenizer.from_json(pythia_like(), "pythia")


@settings(max_examples=100, deadline=None)
@given(ANY_TEXT | st.text(" \n\u0301eé<|>", max_size=40))
def test_any_text_comes_back_exactly_from_a_file_as_pythias(text):
    read = read_pythia()
    ids = read.encode(text.encode())
    assert read.decode(ids) == text.encode()
    assert read.bytes_V[ids].sum() == len(text.encode())
    assert (ids == 0).sum() == text.count("\0")


def test_an_added_token_whose_own_text_is_not_nfc_is_found_as_it_is_written():
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    added = [*json.loads(pythia_like())["added_tokens"], {"id": 323, "content": "e\u0301", **plain}]
    read = tokenizer.from_json(pythia_like(added_tokens=added), "x")
    assert read.encode("e\u0301".encode()).tolist() == [323]
    assert read.decode(read.encode("\u00e9 e\u0301".encode())) == "\u00e9 e\u0301".encode()


@pytest.mark.parametrize(
    "normalizer",
    [{"type": "NFKC"}, {"type": "NFD"}, {"type": "Lowercase"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
     {"type": "Prepend", "prepend": "x"}],
)  # fmt: skip
def test_normalisers_other_than_nfc_are_refused(normalizer):
    with pytest.raises(BadInput, match=r"^x normalises text, .*; `normalizer` must be null or NFC$"):
        tokenizer.from_json(pythia_like(normalizer=normalizer), "x")


def test_padding_and_truncation_of_a_file_do_not_touch_text():
    engine = gpt2_like()
    engine.enable_truncation(3)
    engine.enable_padding(length=50)
    read = tokenizer.from_json(engine.to_str(), "short")
    assert read.decode(read.encode(TEXTS[2])) == TEXTS[2]


def pre(**changes):
    return {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
            | changes}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lambda good: "", "x is not a tokenizers JSON file: "),
        (lambda good: good[: len(good) // 2], "x is not a tokenizers JSON file: "),
        (lambda good: "[1, 2]", "x is not a tokenizers JSON file: "),
        (lambda good: edited(good, pre_tokenizer=None), "x is not byte-level: it must cut text by ByteLevel"),
        (lambda good: edited(good, **pre(add_prefix_space=True)), "x is not byte-level: it must cut text by ByteLevel"),
        (lambda good: edited(good, added_tokens=[]), "x has no special token that ends a document"),
        (lambda good: edited(good, model=json.loads(good)["model"] | {"dropout": 0.1}), "x encodes at random"),
    ],
)
def test_a_file_that_does_not_do_is_refused_in_one_line(text, message):
    with pytest.raises(BadInput, match=message) as error:
        tokenizer.from_json(text(gpt2_like().to_str()), "x")
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_words_is_refused():
    engine = library.Tokenizer(library.models.WordLevel({"日本": 0, "[UNK]": 1}, unk_token="[UNK]"))
    engine.add_special_tokens(["</s>"])
    with pytest.raises(BadInput, match="x is not byte-level: a token holds '日', which stands for no byte"):
        tokenizer.from_json(engine.to_str(), "x")
    engine = library.Tokenizer(library.models.WordLevel({"word": 0, "[UNK]": 1}, unk_token="[UNK]"))
    engine.add_special_tokens(["</s>"])
    with pytest.raises(BadInput, match="x is not byte-level: 242 bytes have no token"):
        tokenizer.from_json(engine.to_str(), "x")


def test_a_tokenizer_that_loses_text_is_refused_when_it_does():
    engine = gpt2_like()
    byte_level = engine.pre_tokenizer
    engine.pre_tokenizer = library.pre_tokenizers.Sequence([library.pre_tokenizers.Split(" ", "removed"), byte_level])
    read = tokenizer.from_json(engine.to_str(), "x")
    assert read.decode(read.encode(b"thecat")) == b"thecat"
    with pytest.raises(BadInput, match="does not give back the text that it encodes"):
        read.encode(b"the cat")


def test_a_missing_file_and_a_binary_one_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"data\.tokenizer=x cannot be read as a tokenizer: No such file"):
        tokenizer.load(tmp_path / "gone", "data.tokenizer=x")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match=r"data\.tokenizer=x is not a tokenizers JSON file: it is not text"):
        tokenizer.load(tmp_path / "binary", "data.tokenizer=x")


def test_bytes_that_are_no_text_and_ids_that_are_no_tokens_are_refused(bpe):
    with pytest.raises(BadInput, match=r"must be UTF-8 \(byte 0xe9\)"):
        bpe.encode(b"caf\xe9")
    assert BYTES.decode(BYTES.encode(b"caf\xe9")) == b"caf\xe9"
    for ids in ([-1], [330]):
        with pytest.raises(BadInput, match="token ids must be from 0 to 329"):
            bpe.decode(ids)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(BadInput, match=r"pip install 'jaxgpt\[bpe\]'"):
        tokenizer.train(TEXTS, 300)
    assert BYTES.encode(b"ab").tolist() == [97, 98]


def test_the_module_is_read_without_jax_and_without_the_package():
    code = "import sys, jaxgpt.tokenizer; sys.exit(bool({'jax', 'tokenizers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
