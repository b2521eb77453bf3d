"""``python -m hfgen`` is the command ``hfgen``."""

import sys

from hfgen.cli import main

if __name__ == "__main__":
    sys.exit(main())
