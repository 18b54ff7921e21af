"""Measure the instrument itself: speed, and whether it finds an effect where there is one.

python -m bench step --size tiny           # step, chunk, load, loop, data, world or sim: speed
python -m bench control                    # the positive and the negative control, 2 minutes on one core
"""

import sys

from bench import control, speed
from files import told

if __name__ == "__main__":
    with told():
        if sys.argv[1:2] == ["control"]:
            sys.exit(control.main(sys.argv[2:]))
        speed.main()
