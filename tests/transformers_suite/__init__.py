"""transformers' own GPT-2 tests, run with its models as they are, patched, and of gpt2_fast.hf: side by side.

    python -m tests.transformers_suite --suite FOLDER

FOLDER is a checkout of transformers; the transformers that is installed is what its tests are run with.
"""
