"""``python -m asgo.lab``."""

import sys

from asgo.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
