"""``python -m robustloader`` is the command ``robustloader``."""

import sys

from robustloader.cli import main

# Workers that are spawned import this module again, and must not run it.
if __name__ == "__main__":
    sys.exit(main())
