"""`gpt2-fast doctor`."""

from __future__ import annotations

import argparse


def add(commands) -> None:
    parser = commands.add_parser(
        "doctor", help="what runs on this machine, and why", description="Machine, versions, and op by op what runs."
    )
    parser.add_argument("--patch", metavar="MODEL",
                        help="what gpt2_fast.patch takes over of a transformers checkpoint, and what not")  # fmt: skip
    parser.add_argument("--kernels", action="store_true",
                        help="compile every Triton kernel for sm_80, sm_90 and sm_100; needs no GPU")  # fmt: skip
    parser.add_argument("--arch", type=int, choices=(80, 90, 100), action="append", metavar="80|90|100",
                        help="with --kernels: this target alone (may be repeated)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="with --kernels: one configuration of each kernel")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from gpt2_fast.report import doctor

    if arguments.patch is not None:
        print(doctor.explain_patch_of(arguments.patch))
        return 0
    if not arguments.kernels:
        doctor.report()
        return 0
    return 1 if doctor.check_kernels(tuple(arguments.arch or doctor.ARCHS), arguments.quick) else 0
