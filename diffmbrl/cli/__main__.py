"""`python -m diffmbrl.cli`."""

import sys

from diffmbrl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
