"""`python -m diffguide`."""

import sys

from diffguide.cli import main

if __name__ == "__main__":
    sys.exit(main())
