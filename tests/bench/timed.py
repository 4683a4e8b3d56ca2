"""Usage: timed.py OUTPUT COMMAND...: what a command takes, as JSON on standard output; its own goes to OUTPUT.

A process of its own, and a small one: the peak that the kernel reports for a child is at least what its
parent had when it forked.
"""

import json
import os
import sys
import time

start = time.perf_counter()
pid = os.fork()
if not pid:
    os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 1)
    os.execvp(sys.argv[2], sys.argv[2:])
_, status, usage = os.wait4(pid, 0)
took = {"seconds": time.perf_counter() - start, "rc": os.waitstatus_to_exitcode(status)}
print(json.dumps({**took, "cpu": usage.ru_utime + usage.ru_stime, "rss": usage.ru_maxrss * 1024}))
