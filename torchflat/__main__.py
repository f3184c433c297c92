"""``python -m torchflat`` is the ``torchflat`` command."""

import sys

from torchflat.cli import main

sys.exit(main())
