"""python -m tests.golden [GATE ...]: remakes the files that tests compare; without a name, all of them."""

from __future__ import annotations

import argparse

from . import losses, names, options

GATES = {"losses": losses.remake, "names": names.remake, "options": options.remake}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("gates", nargs="*", metavar="GATE", help=", ".join(GATES))
    chosen = parser.parse_args().gates or list(GATES)
    for name in chosen:
        if name not in GATES:
            parser.error(f"no gate {name!r}; choose from {', '.join(GATES)}")
    for name in chosen:
        print(GATES[name](), flush=True)


if __name__ == "__main__":
    main()
