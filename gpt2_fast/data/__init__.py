"""Token data: from text and shards on disk to batches of ids.

corpus        what a source names, `load_data` and `load_tokens`, and the default corpus
batches       windows of shards as batches: `TokenDataset`
order         the order of an epoch: every window once, shuffled
shards        nanoGPT's and llm.c's .bin files
text          text files and their tokens, which are cached
jsonl         JSON Lines, with errors that name the line
tokenizer     GPT-2's byte-pair encoding
characters    nanoGPT's vocabularies of characters
plain_pickle  their tables, read without running them
hub           data sets of the recipes, from the Hugging Face hub

A batch is a function of (seed, step, micro_step) and of sizes alone, so a run that resumes needs no state from here.
State of the process: the tokenizer of `get_tokenizer`, made once; `_round_keys` of the epochs that were last asked for.
"""

from __future__ import annotations

from gpt2_fast.lazy import exports

_NAMES = {
    "corpus": ("load_data", "load_tokens"),
    "batches": ("TokenDataset",),
    "shards": ("Shard", "read_bin", "write_bin"),
    "tokenizer": ("Tokenizer", "get_tokenizer"),
    "hub": ("fetch",),
    "characters": ("CharacterTokenizer",),
}
__getattr__, __dir__, __all__ = exports(__name__, _NAMES)
