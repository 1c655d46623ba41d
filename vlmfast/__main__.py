"""``python -m vlmfast``."""

import sys

from vlmfast.cli import main

sys.exit(main())
