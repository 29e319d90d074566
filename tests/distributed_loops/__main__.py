"""One rank of a group of cases: `python -m distributed_loops GROUP FOLDER [NAME ...]`."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from . import GROUPS, setting


def main(arguments: list[str]) -> None:
    group, folder, wanted = arguments[0], Path(arguments[1]), arguments[2:]
    setting.folder = folder
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    found = {}
    for function in GROUPS[group]:
        if wanted and function.__name__ not in wanted:
            continue
        started = time.perf_counter()
        try:
            found[function.__name__] = function()
        except BaseException:
            found[function.__name__] = traceback.format_exc()
        finally:
            if os.environ.get("VERBOSE") and dist.get_rank() == 0:
                print(function.__name__, f"{time.perf_counter() - started:.1f} s", found[function.__name__], flush=True)
            (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # what torch's threads do as an interpreter ends is not under test


if __name__ == "__main__":
    main(sys.argv[1:])
