"""``python -m radix_compile``: the command line."""

import sys

from radix_compile.cli import main

sys.exit(main())
