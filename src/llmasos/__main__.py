"""`python -m llmasos`: the same as the command `llmasos`."""

import sys

from llmasos.cli import main

sys.exit(main())
