"""Faults while a run is saved: killed at any call to the file system, a full disk, a broken one, a clock that jumps.

inject.c  the faults, loaded by LD_PRELOAD
plans     what goes wrong, and the plans of a whole suite
runs      one run in a fork of a warm process, under a plan
trials    a run that is faulted and resumed until it is finished, beside one that nothing interrupted

``python -m tests.faults --kills 200 --seed 1`` tries them and prints a table.
"""
