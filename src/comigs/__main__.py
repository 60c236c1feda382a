"""This module makes `python -m comigs` the same as `comigs`."""

import sys

from comigs.app.cli import main

if __name__ == "__main__":
    sys.argv[0] = "comigs"  # what a run's record of its command begins with
    main()
