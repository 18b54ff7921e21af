"""LIBERO's two programs: record scripted demonstrations, and verify that this machine replays episodes.

python -m simulator record --task-ids 1 --demos-per-task 1 --init-states 0 --size 64 --out data/try
python -m simulator verify                 # replay the recorded episodes in tests/libero_env
"""

import importlib
import sys

from files import let_readers_go

PROGRAMS = ("record", "verify")  # each a module beside this one, with main(argv)


def main() -> None:
    """Hand the command line to the program that it names."""
    let_readers_go()
    if sys.argv[1:2] and sys.argv[1] in PROGRAMS:
        importlib.import_module(f"simulator.{sys.argv[1]}").main(sys.argv[2:])
    elif sys.argv[1:2] in (["--help"], ["-h"]):
        print(__doc__)
    else:
        said = " ".join(sys.argv[1:]) or "nothing"
        sys.exit(f"error: python -m simulator takes {' or '.join(PROGRAMS)}, got {said}")


if __name__ == "__main__":
    main()
