"""`python -m cruxy_triton` is the `cruxy-triton` command."""

import sys

from cruxy_triton.cli import main

sys.exit(main())
