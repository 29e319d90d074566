"""Token data: formats, splits, the cache, batches that depend on the step alone, and clear refusals."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch

from gpt2_fast import GPT2Config, GPT2LMHeadModel
from gpt2_fast.cli import main
from gpt2_fast.data import Shard, TokenDataset, batches, corpus, load_data, load_tokens, read_bin, write_bin
from gpt2_fast.data import text as texts
from gpt2_fast.data.tokenizer import get_tokenizer
from gpt2_fast.evaluate.tasks import encode_text


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GPT2_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))


def counting(n, path="x.bin", start=0):
    """A shard in which every token is its own position."""
    return Shard(path, np.arange(start, start + n, dtype=np.uint16))


def dataset(*lengths, context=4, vocab_size=50257):
    starts = np.cumsum([0, *lengths])
    return TokenDataset(
        [counting(n, f"{i}.bin", start) for i, (n, start) in enumerate(zip(lengths, starts, strict=False))],
        context=context,
        vocab_size=vocab_size,
    )


def assert_one_line(error, words):
    message = str(error)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


def test_batch_is_the_data_and_the_next_tokens():
    x, y = dataset(1000, context=7).batch(3, 1, batch_size=5, seed=2)
    assert x.shape == y.shape == (5, 7)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous()
    assert y.is_contiguous()
    assert torch.equal(x, x[:, :1] + torch.arange(7))
    assert torch.equal(y, x + 1)


def test_batch_depends_on_seed_step_and_micro_step_only():
    tokens = dataset(50000)
    first = tokens.batch(5, 2, batch_size=8, seed=1)[0]
    tokens.batch(6, 0, batch_size=8, seed=1)
    assert torch.equal(first, tokens.batch(5, 2, batch_size=8, seed=1)[0])
    for step, micro_step, seed in [(4, 2, 1), (5, 1, 1), (5, 2, 0), (2, 5, 1), (1, 2, 5), (5, 2, -1)]:
        assert not torch.equal(first, tokens.batch(step, micro_step, batch_size=8, seed=seed)[0])


def test_batch_values_are_fixed_for_good():
    """A run resumed on another NumPy sees the same data: Philox4x64-10 of key (1, 5) and counter (1, 0, 0, 2)."""
    starts = dataset(50000).batch(5, 2, batch_size=4, seed=1)[0][:, 0]
    assert starts.tolist() == [6390, 5181, 21078, 46790]


def test_every_start_is_drawn_and_no_window_crosses_shards():
    tokens = dataset(9, 3, 6)  # the second is shorter than a window of 5
    x, y = tokens.batch(0, batch_size=2000)
    starts, counts = torch.unique(x[:, 0], return_counts=True)
    assert starts.tolist() == [0, 1, 2, 3, 4, 12, 13]
    assert torch.equal(y, x + 1)
    assert counts.min() > 2000 / 7 * 0.7
    assert len(tokens) == 15


def test_windows_do_not_overlap_and_cover_the_data():
    tokens = dataset(13, 4, 9, 8)  # (13 - 1) // 4 + (9 - 1) // 4 + (8 - 1) // 4; 4 tokens are too few
    batches = list(tokens.windows(batch_size=2))
    assert [len(x) for x, _ in batches] == [2, 2, 2]
    x = torch.cat([x for x, _ in batches])
    y = torch.cat([y for _, y in batches])
    assert x[:, 0].tolist() == [0, 4, 8, 17, 21, 26]
    assert torch.equal(y, x + 1)
    assert tokens.n_windows == 6


@pytest.mark.parametrize(("limit", "starts"), [(1, [0]), (2, [0, 20]), (5, [0, 8, 16, 24, 32]), (99, None), (0, [])])
def test_limited_windows_are_spread_evenly(limit, starts):
    found = [start for x, _ in dataset(41).windows(batch_size=3, limit=limit) for start in x[:, 0].tolist()]
    assert found == (list(range(0, 40, 4)) if starts is None else starts)


def test_nanogpt_folder(tmp_path):
    np.arange(100, dtype="<u2").tofile(tmp_path / "train.bin")
    np.arange(200, 250, dtype="<u2").tofile(tmp_path / "val.bin")
    np.arange(900, 950, dtype="<u2").tofile(tmp_path / "test.bin")
    train, val = load_data(tmp_path, context=8)
    assert train.shards[0].tokens.tolist() == list(range(100))
    assert val.shards[0].tokens.tolist() == list(range(200, 250))
    assert isinstance(train.shards[0].tokens, np.memmap)


@pytest.mark.parametrize("word", ["val", "valid", "validation"])
def test_a_file_is_named_for_its_part(tmp_path, word):
    for i, name in enumerate(["a_train", f"a_{word}_0", "a_test", f"in{word}"]):  # the last one is no such word
        np.arange(i * 100, i * 100 + 50, dtype="<u2").tofile(tmp_path / f"{name}.bin")
    train, val = load_data(tmp_path, context=8)
    assert sorted(int(shard.tokens[0]) for shard in train.shards) == [0, 300]
    assert [shard.tokens.tolist() for shard in val.shards] == [list(range(100, 150))]


def test_every_token_counts_in_a_fingerprint():
    """All of a small shard; of one above 2^20 tokens what is in a sample. Its length counts as well."""
    size, small, large = 1000, np.zeros(1000, np.uint16), np.zeros(2**20 + 5000, np.uint16)
    sample = 100 * (len(large) - 4096) // 255
    found = set()
    for tokens, places in ((small, (None, 0, size // 2, size - 1)), (large, (None, 0, sample + 17, len(large) - 1))):
        for place in places:
            changed = tokens.copy()
            if place is not None:
                changed[place] = 1
            found.add(TokenDataset([Shard("a.bin", changed)], context=4, vocab_size=9).fingerprint())
    found.add(TokenDataset([Shard("a.bin", small[:-1])], context=4, vocab_size=9).fingerprint())
    assert len(found) == 9
    assert TokenDataset([Shard("b.bin", small)], context=4, vocab_size=9).fingerprint() in found


def test_llmc_shards_by_pattern(tmp_path):
    for i, name in enumerate(["fineweb_train_000001", "fineweb_train_000002", "fineweb_val_000000"]):
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, 30
        body = np.arange(i * 100, i * 100 + 30, dtype="<u2")
        (tmp_path / f"{name}.bin").write_bytes(header.tobytes() + body.tobytes())
    train, val = load_data(str(tmp_path / "fineweb_*.bin"), context=8)
    assert [shard.tokens[0] for shard in train.shards] == [0, 100]
    assert [shard.tokens.tolist() for shard in val.shards] == [list(range(200, 230))]
    whole = load_tokens([tmp_path / "fineweb_val_000000.bin"], context=8)
    assert len(whole) == 30


def test_last_fraction_is_validation(tmp_path):
    for i in range(3):
        np.arange(i * 100, i * 100 + 100, dtype="<u2").tofile(tmp_path / f"{i}.bin")
    train, val = load_data(tmp_path, context=8, val_fraction=0.4)
    assert [list(shard.tokens[[0, -1]]) for shard in train.shards] == [[0, 99], [100, 179]]
    assert [list(shard.tokens[[0, -1]]) for shard in val.shards] == [[180, 199], [200, 299]]


def test_validation_has_at_least_a_window(tmp_path):
    np.arange(100, dtype="<u2").tofile(tmp_path / "a.bin")
    train, val = load_data(tmp_path / "a.bin", context=8, val_fraction=0.001)
    assert (len(train), len(val)) == (91, 9)


def test_bin_round_trip(tmp_path):
    parts = [np.arange(5, dtype=np.uint16), np.array([65535, 7], dtype=np.uint16)]
    assert write_bin(tmp_path / "sub" / "a.bin", parts) == 7
    assert read_bin(tmp_path / "sub" / "a.bin").tokens.tolist() == [0, 1, 2, 3, 4, 65535, 7]
    assert os.listdir(tmp_path / "sub") == ["a.bin"]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    def parts():
        yield np.arange(5, dtype=np.uint16)
        raise KeyboardInterrupt

    write_bin(tmp_path / "a.bin", [np.arange(3, dtype=np.uint16)])
    with pytest.raises(KeyboardInterrupt):
        write_bin(tmp_path / "a.bin", parts())
    assert os.listdir(tmp_path) == ["a.bin"]
    assert len(read_bin(tmp_path / "a.bin").tokens) == 3


def test_text_in_blocks_has_the_ids_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "BLOCK", 50)
    monkeypatch.setattr(texts, "PIECE", 11)
    text = "def f(x):\r\n    return  'naïve — 世界'\n\n\n" * 30
    (tmp_path / "a.txt").write_bytes(text.encode())
    tokens = load_tokens(tmp_path / "a.txt", context=8)
    assert tokens.shards[0].tokens.tolist() == [*get_tokenizer().encode(text), 50256]


def test_folder_of_text(tmp_path):
    files = {"a.py": "x = 1\n", "deep/b.md": "# Title\n", "deep/empty.txt": "", "c": "plain"}
    files |= {f"{i}.txt": f"number {i}" for i in range(6)}
    skipped = {"photo.jpg": b"\xff\xd8\xff\xe0abc", ".git/config": b"[core]", "n.dat": b"a\0b"}
    for name, content in [*files.items(), *skipped.items()]:
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    tokens = load_tokens(tmp_path / "corpus", context=2).shards[0].tokens
    documents = get_tokenizer().decode(tokens).split("<|endoftext|>")
    # The order is a matter of the names alone: of their hashes.
    order = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert documents == [files[name] for name in order if files[name]] + [""]
    os.rename(tmp_path / "corpus", tmp_path / "moved")
    assert np.array_equal(load_tokens(tmp_path / "moved", context=2).shards[0].tokens, tokens)


DOCUMENTS = ["one two three", "naïve — 世界\n\n line", "<|endoftext|> is text here", "\ud83d alone"]


def write_jsonl(path, documents):
    path.write_text("\n".join(json.dumps({"id": 7, "text": text}) for text in documents) + "\n\n")
    return path


def test_jsonl_is_a_document_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "PIECE", 5)
    path = write_jsonl(tmp_path / "a.jsonl", [*DOCUMENTS[:2], "", *DOCUMENTS[2:]])
    tokens = load_tokens(path, context=2).shards[0].tokens.tolist()
    assert tokens == [i for text in DOCUMENTS for i in [*get_tokenizer().encode(text), 50256]]
    assert tokens.count(50256) == len(DOCUMENTS)
    (tmp_path / "b.txt").write_text("plain words here")
    whole = load_tokens(tmp_path, context=2)  # a folder of both
    assert sorted(map(len, (s.tokens for s in whole.shards))) == [4, len(tokens)]


def test_jsonl_is_tokenised_once(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    first = load_tokens(path, context=2).shards[0].tokens.tolist()
    monkeypatch.setattr(texts, "_encode", None)
    assert load_tokens(path, context=2).shards[0].tokens.tolist() == first


def test_jsonl_named_for_validation(tmp_path):
    for name, text in [("train", "red"), ("val", "blue"), ("test", "green")]:
        write_jsonl(tmp_path / f"{name}.jsonl", [text] * 3)
    parts = [get_tokenizer().decode(part.shards[0].tokens) for part in load_data(tmp_path, context=2)]
    assert parts == ["red<|endoftext|>" * 3, "blue<|endoftext|>" * 3]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a"', "a.jsonl line 2 is not a JSON object"),
        ('"text"', "a.jsonl line 2 is not a JSON object"),
        ('{"content": "a", "id": 1}', "a.jsonl line 2 has no 'text'; it has 'content', 'id'"),
        ('{"text": null}', "a.jsonl line 2: 'text' is None; it must be a string"),
    ],
)
def test_bad_jsonl_names_the_line_and_leaves_nothing(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n' + line)
    with pytest.raises(ValueError) as error:
        load_data(tmp_path / "a.jsonl", context=2)
    assert_one_line(error.value, [words])
    assert not any((texts.cache_dir() / "tokens").iterdir())


def test_fine_tuning_on_jsonl(tmp_path):
    """`train --init-from` learns the documents and leaves a Hugging Face folder; a bad line ends it before any step."""
    model = GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=1))
    model.save_pretrained(tmp_path / "start")
    path = write_jsonl(tmp_path / "a.jsonl", ["A dog and a cat.", "A cat and a dog."] * 20)
    command = ["train", "--init-from", str(tmp_path / "start"), "--data", str(path), "--steps", "12", "--lr", "0.01"]
    command += ["--batch-size", "4", "--warmup", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    losses = [json.loads(line).get("val_loss") for line in (tmp_path / "run" / "metrics.jsonl").open()]
    before, *_, after = [loss for loss in losses if loss]
    assert before > 10
    assert after < before - 1
    tuned = GPT2LMHeadModel.from_pretrained(tmp_path / "run" / "checkpoint")
    x, y = load_tokens(path, context=16).batch(0, batch_size=2)
    assert tuned(x, targets=y).loss < model(x, targets=y).loss - 1
    path.write_text("{}")
    assert main([*command[:-1], str(tmp_path / "bad")]) == 2
    assert not (tmp_path / "bad").exists()


def test_jsonl_without_text(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl has no text"):
        load_data(write_jsonl(tmp_path / "a.jsonl", ["", ""]), context=2)
    assert not any((texts.cache_dir() / "tokens").iterdir())


LATIN, UTF16 = "Grüße, café. ".encode("latin-1"), "Grüße, café. ".encode("utf-16")
NOT_TEXT = [
    ("a.txt", LATIN, "not UTF-8 text (byte 2)"),
    ("a.txt", b"\xef\xbb\xbf" + LATIN, "not UTF-8 text (byte 5)"),
    ("a.txt", b"x" * 120 + "é".encode() * 30 + b"\xff", "not UTF-8 text (byte 180)"),  # in another block
    ("a.txt", b"plain, and cut in \xc3", "not UTF-8 text (byte 18)"),
    ("a.md", UTF16, "not UTF-8 text (byte 0)"),
    ("a.md", "plain".encode("utf-16-le"), "not text (byte 1 is NUL)"),
    ("a.md", b"x" * 49 + "é\0".encode(), "not text (byte 51 is NUL)"),
    ("a.txt.gz", b"\x1f\x8b\x08" + b"x" * 99, "not UTF-8 text (byte 1)"),
    ("a.png", b"\x89PNG\r\n\x1a\n" + b"x" * 99, "not UTF-8 text (byte 0)"),
    ("a.npy", b"\x93NUMPY\1\0" + b"x" * 99, "not UTF-8 text (byte 0)"),
    ("a.safetensors", b"@\0\0\0\0\0\0\0{}", "not text (byte 1 is NUL)"),
    ("a.jsonl", b'{"text": "' + LATIN + b'"}', "line 1 is not a JSON object (not UTF-8)"),
]


@pytest.mark.parametrize(("name", "content", "words"), NOT_TEXT)
def test_what_is_not_text_is_refused_by_name(tmp_path, monkeypatch, name, content, words):
    monkeypatch.setattr(texts, "BLOCK", 50)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes(content)
    (folder / "good.txt").write_text("one two three " * 9)
    named = name.endswith((".txt", ".md", ".jsonl"))
    for source in [folder / name, folder] if named else [folder / name]:
        with pytest.raises(ValueError) as error:
            load_tokens(source, context=2)
        assert_one_line(error.value, [folder / name, words])
    if not named:  # of another kind: left out
        tokens = load_tokens(folder, context=2).shards[0].tokens
        assert get_tokenizer().decode(tokens) == "one two three " * 9 + "<|endoftext|>"
    if not name.endswith(".jsonl"):
        with pytest.raises(ValueError) as error:
            encode_text(get_tokenizer(), folder / name)
        assert_one_line(error.value, [folder / name, words])


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone two\xef\xbb\xbf three")
    wanted = get_tokenizer().encode("one two\ufeff three")
    assert load_tokens(tmp_path / "a.txt", context=2).shards[0].tokens.tolist() == [*wanted, 50256]
    assert encode_text(get_tokenizer(), tmp_path / "a.txt").tolist() == wanted
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(ValueError, match=r"b\.txt has no text"):
        load_tokens(tmp_path / "b.txt", context=2)


def test_suffixes_in_capitals(tmp_path):
    write_jsonl(tmp_path / "A.JSONL", ["one two three"])
    tokens = load_tokens(tmp_path / "A.JSONL", context=2).shards[0].tokens
    assert get_tokenizer().decode(tokens) == "one two three<|endoftext|>"
    np.arange(9, dtype="<u2").tofile(tmp_path / "B.BIN")
    for source in (tmp_path / "B.BIN", tmp_path):
        assert load_tokens(source, context=2).shards[0].tokens.tolist() == list(range(9))


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private.txt").write_text("one two three " * 99)
    for source in ("", [""]):
        with pytest.raises(ValueError, match="data is '', no name"):
            load_tokens(source, context=2)
    for more in ([], ["--dry-run"]):
        assert main(["train", "--data", "", "--model", "nano", *more]) == 2
        assert_one_line(capsys.readouterr().err.strip(), ["--data is empty"])


@pytest.mark.parametrize("dtype", ["<u4", "<i8", ">u4", ">i8"])
def test_wider_numbers_in_a_bin_are_refused(tmp_path, dtype):
    ids = np.arange(4000)
    (ids + 70000 * (dtype[0] == "<") * (ids % 7 == 0)).astype(dtype).tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError) as error:
        load_tokens(tmp_path / "a.bin", context=2)
    assert_one_line(error.value, [tmp_path / "a.bin", "32 or 64 bits", "uint16"])


@pytest.mark.parametrize("ids", [np.arange(4000) % 4, np.zeros(4000), np.arange(4000) % 5, np.arange(500) % 2 * 9])
def test_small_vocabularies_are_tokens(tmp_path, ids):
    ids.astype("<u2").tofile(tmp_path / "a.bin")
    assert np.array_equal(load_tokens(tmp_path / "a.bin", context=2).shards[0].tokens, ids)


def test_cut_character_does_not_make_a_file_binary(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 4095 + "é".encode())
    (tmp_path / "b.txt").write_bytes(b"x" * 4000 + b"\xff" + b"x" * 200)
    assert [texts._is_text(tmp_path / name) for name in ("a.txt", "b.txt")] == [True, False]


def test_cache_is_used_and_never_stale(tmp_path, monkeypatch):
    calls = []
    encode = texts._encode
    monkeypatch.setattr(texts, "_encode", lambda text: calls.append(text) or encode(text))
    path = tmp_path / "a.txt"

    def first_ids():
        tokens = load_tokens(path, context=2).shards[0].tokens
        return get_tokenizer().decode(tokens), len([call for call in calls if call])

    path.write_text("one two three")
    assert first_ids() == ("one two three<|endoftext|>", 1)
    assert first_ids() == ("one two three<|endoftext|>", 1)
    path.write_text("one two eight")
    os.utime(path, ns=(1, 1))
    assert first_ids() == ("one two eight<|endoftext|>", 2)
    # Of the same size and time: written anew, and another file under the name.
    path.write_text("one two seven")
    os.utime(path, ns=(1, 1))
    assert first_ids() == ("one two seven<|endoftext|>", 3)
    other = tmp_path / "other"
    other.write_text("one two fifty")
    os.utime(other, ns=(1, 1))
    other.replace(path)
    assert first_ids() == ("one two fifty<|endoftext|>", 4)
    # A cache file that lost its end is made again.
    for cached in (texts.cache_dir() / "tokens").iterdir():
        cached.write_bytes(cached.read_bytes()[:-2])
    assert first_ids() == ("one two fifty<|endoftext|>", 5)


def test_default_corpus_is_the_standard_library(tmp_path, monkeypatch):
    library = corpus._standard_library()
    names = [name for name, _ in library]
    assert {"argparse.py", "json/decoder.py", "turtle.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert names != sorted(names)
    monkeypatch.setattr(corpus, "_standard_library", lambda: [item for item in library if item[0] == "heapq.py"])
    train, val = load_data(context=16)
    text = get_tokenizer().decode(np.concatenate([train.shards[0].tokens, val.shards[0].tokens]))
    with open(dict(library)["heapq.py"], encoding="utf-8", newline="") as file:
        assert text == file.read() + "<|endoftext|>"
    assert "standard library" in train.name


def header(magic, version=1, count=4, tokens=4):
    words = np.zeros(256, dtype="<i4")
    words[:3] = magic, version, count
    return words.tobytes() + np.arange(tokens, dtype="<u2").tobytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["a.bin is empty"]),
        (b"abc", ["3 bytes", "odd"]),
        (header(20240520)[:-2], ["holds 3 tokens", "says 4", "truncated"]),
        (header(20240520)[:100], ["100 bytes", "truncated"]),
        (header(20240520, version=7), ["version 7"]),
        (header(20240520, count=0, tokens=0), ["header says 0 tokens"]),
        (header(20240801, version=7), ["another vocabulary"]),
        (header(20240326, version=3), ["llm.c model checkpoint"]),
        (b"PK\x03\x04" + bytes(100), ["zip archive"]),
    ],
)
def test_bad_bin_is_named_in_one_line(tmp_path, content, words):
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_data(path, context=2)
    assert_one_line(error.value, [path, *words])


def test_id_outside_the_vocabulary(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    np.array([1, 2, 300, 4] * 10, dtype="<u2").tofile(path)
    with pytest.raises(ValueError) as error:
        load_tokens(path, context=2, vocab_size=300)
    assert_one_line(error.value, [path, "token id 300 at position 2", "vocabulary of 300"])
    # What opening did not look at is seen in the batch.
    monkeypatch.setattr(batches, "CHECKED_AT_ONCE", 2)
    tokens = load_tokens(path, context=2, vocab_size=300)
    with pytest.raises(ValueError, match="token id 300 at position"):
        tokens.batch(0, batch_size=20)
    with pytest.raises(ValueError, match="token id 300 at position"):
        list(tokens.windows(batch_size=20))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("name", ["a.txt", "a.bin"])
def test_a_pipe_is_no_data(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a pipe or device, and data is read more than once; write it to"):
        load_data(tmp_path / name, context=8)


def test_missing_empty_and_short_data(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        load_data(tmp_path / "nothing.txt", context=2)
    assert_one_line(missing.value, [tmp_path / "nothing.txt", "does not exist"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder holds no \.bin, \.jsonl or text file"):
        load_data(tmp_path / "folder", context=2)
    (tmp_path / "folder" / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        load_data(tmp_path / "folder", context=2)
    (tmp_path / "short.txt").write_text("one two three")  # 4 tokens with <|endoftext|>
    for call in (load_data, load_tokens):
        with pytest.raises(ValueError) as short:
            call(tmp_path / "short.txt", context=8)
        assert_one_line(short.value, ["short.txt has 4 tokens", "context of 8", "shorter context"])
    with pytest.raises(ValueError, match="needs 5"):  # a context needs the token that follows it
        load_tokens(tmp_path / "short.txt", context=4)
    with pytest.raises(ValueError, match="18"):
        load_data([tmp_path / "short.txt"] * 2, context=8)


def test_unwritable_cache_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPT2_FAST_CACHE", str(tmp_path / "file"))
    (tmp_path / "a.txt").write_text("one two three")
    with pytest.raises(OSError, match="cannot write") as error:
        load_tokens(tmp_path / "a.txt", context=2)
    assert_one_line(error.value, ["set GPT2_FAST_CACHE"])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_bad_fraction(fraction):
    with pytest.raises(ValueError, match="val_fraction is"):
        load_data(context=2, val_fraction=fraction)


def test_bad_context():
    with pytest.raises(ValueError, match="context is 0"):
        dataset(10, context=0)
