"""`python -m dynslice`."""

import sys

try:
    from dynslice.cli.commands import main

    sys.exit(main())
except KeyboardInterrupt:  # before `main` could handle it
    sys.exit("dynslice: interrupted; the same command again starts anew")
