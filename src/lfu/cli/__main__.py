"""`python -m lfu.cli`: for `accelerate launch -m lfu.cli train ...` and where `lfu` is not on the path."""

import sys

from lfu.cli import main

if __name__ == "__main__":
    sys.exit(main())
