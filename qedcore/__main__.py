"""python3 -m qedcore"""

import sys

from .cli import main

sys.exit(main())
