"""Python runs this in every server that a test starts (support.server sees to it): kill -USR2 shows stacks."""

import faulthandler
import signal

faulthandler.register(signal.SIGUSR2, all_threads=True)
