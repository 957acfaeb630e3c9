"""`python -m dynslice`."""

import sys

try:
    from dynslice.cli import main

    sys.exit(main())
except KeyboardInterrupt:  # before `main` could heed it
    sys.exit("dynslice: interrupted; the same command again starts anew")
