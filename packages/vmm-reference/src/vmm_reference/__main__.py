"""`python -m vmm_reference` is the command `vmm`."""

import sys

from .cli import main

sys.exit(main())
