"""`gpt2-fast doctor`."""

from __future__ import annotations

import argparse

from gpt2_fast.cli.shared import refuse_without


def add(commands) -> None:
    parser = commands.add_parser(
        "doctor", help="what runs on this machine, and why", description="Machine, versions, and op by op what runs."
    )
    parser.add_argument("--patch", metavar="MODEL",
                        help="what gpt2_fast.patch takes over of a transformers checkpoint, and what not")  # fmt: skip
    parser.add_argument("--kernels", action="store_true",
                        help="compile every Triton kernel for every card that is supported; needs no GPU")  # fmt: skip
    parser.add_argument("--arch", action="append", metavar="A,B",
                        help="with --kernels: these targets alone, as in 86,gfx942 (may be repeated)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="with --kernels: one configuration of each kernel")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if not arguments.kernels:
        refuse_without(arguments, ("arch", "quick"), "--kernels")
    elif arguments.patch is not None:
        raise ValueError("--patch and --kernels exclude each other; drop one")
    from gpt2_fast.kernels import cards
    from gpt2_fast.report import doctor

    if arguments.patch is not None:
        print(doctor.explain_patch_of(arguments.patch))
        return 0
    if not arguments.kernels:
        doctor.report()
        return 0
    names = [name for given in arguments.arch or () for name in given.split(",")]
    archs = tuple(dict.fromkeys(map(cards.named, names))) or tuple(cards.ARCHS)
    return 1 if doctor.check_kernels(archs, arguments.quick) else 0
