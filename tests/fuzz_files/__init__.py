"""Damaged files of every format that is read: what comes of each must be right, or refused in one clear line.

formats  a sound file of each format, and how it is read
mutate   what is done to it: bytes, JSON, safetensors headers, zip archives
judge    one damaged file, written and read

``python -m tests.fuzz_files --files 50000`` reads so many in a process that may die of it, with little memory.
"""
