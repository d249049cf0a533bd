"""An engine whose server was killed ends too: nobody can reach it any more, it holds the device,
and the server that is started next would find no room."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

from conserve.engine.door import init_logger

logger = init_logger("vllm.conserve")

GRACE_S = 10.0
"""What vLLM's own way out gets before the process is killed."""


def end_with_parent() -> bool:
    """Watch the process that made this one, from a thread. Only in a process that vLLM made for
    an engine; one that lives in somebody's own program ends with that. Returns whether it watches.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not multiprocessing.current_process().name.startswith("EngineCore"):
        return False
    threading.Thread(target=_watch, args=(parent,), name="conserve-orphan", daemon=True).start()
    return True


def _watch(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    logger.warning("ConServe: the server (pid %d) is gone; its engine ends", parent.pid)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)
