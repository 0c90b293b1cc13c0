"""`python -m dsiprep`: the BIDS App."""

import sys

from dsiprep.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
