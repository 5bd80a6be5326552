"""Stands in for a router or worker: ready at once, then whatever its behaviour says.

usage: stub_child.py ROLE READY_FILE SUPERVISOR_PID BEHAVIOUR
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from stateferry.local.lifeline import die_with_parent

role, ready_file, supervisor_pid, behaviour = sys.argv[1:]
die_with_parent(int(supervisor_pid))
print(f"{role} says hello", file=sys.stderr, flush=True)
if behaviour == "crash":
    print("first reason\nlast reason", flush=True)
    sys.exit(3)
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour != "silent":
    ready = {"grpc": f"127.0.0.1:{os.getpid()}", "pid": str(os.getpid())}
    partial = Path(ready_file).with_suffix(".partial")
    keys = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MALLOC_ARENA_MAX", "STATEFERRY_WORKER_ID")
    ready |= {key: os.environ.get(key, "") for key in keys}
    ready |= {key: value for key, value in os.environ.items() if key.startswith("STATEFERRY_")}
    partial.write_text(json.dumps(ready))
    partial.replace(ready_file)
time.sleep(60)
