"""Groups of processes for tests of several ranks: started once, by forking one that has imported torch, and given many tasks."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

fresh = multiprocessing.get_context("forkserver")
"""Processes come from one server for all test files, which has imported everything and computed nothing: one forked from pytest
could not train, as autograd's threads, which an earlier test may have started, don't survive a fork."""
fresh.set_forkserver_preload(
    ["__main__", "torch", "transformers.models.llama.modeling_llama", "llama1m_ext.train", "llama1m_ext.ops"]
)

WAIT = 280.0
"""Seconds for a task before the test fails."""


class Crew:
    """Processes joined by gloo, over the loopback.

    Args:
        size: how many.
        timeout: of the process group, seconds.
    """

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        handle, self._store = tempfile.mkstemp(prefix="llama1m-crew-")
        os.close(handle)
        os.unlink(self._store)
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = fresh.Pipe()
            process = fresh.Process(target=_serve, args=(rank, size, self._store, timeout, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, ranks: int, task: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What `task(group, *args, **kwargs)` returns on the first `ranks` processes, in order.

        Raises:
            AssertionError: with the traceback of each rank that raised.
        """
        answers = self.answers(ranks, task, *args, **kwargs)
        wrong = [f"rank {r}:\n{text}" for r, (ok, text) in enumerate(answers) if not ok]
        assert not wrong, "\n".join(wrong)
        return [value for _, value in answers]

    def answers(self, ranks: int, task: Callable[..., Any], *args: Any, **kwargs: Any) -> list[tuple[bool, Any]]:
        """As `run`, of each rank (True, value) or (False, traceback); (False, "died") where a process is no more."""
        for pipe in self.pipes[:ranks]:
            with contextlib.suppress(OSError):
                pipe.send_bytes(pickle.dumps((ranks, task, args, kwargs)))  # by value: torch's own way shares memory
        deadline, found = time.monotonic() + WAIT, []
        for pipe in self.pipes[:ranks]:
            try:
                assert pipe.poll(max(0.0, deadline - time.monotonic())), f"no answer within {WAIT} s: {task.__name__}"
                found.append(pickle.loads(pipe.recv_bytes()))
            except (EOFError, ConnectionError):
                found.append((False, "died"))
        return found

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._store)


def _serve(rank: int, size: int, store: str, timeout: float, pipe: Any) -> None:
    import datetime

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)
    groups = {n: dist.new_group(list(range(n)), timeout=limit) for n in range(1, size)}  # which all of them make
    groups[size] = dist.group.WORLD
    while True:
        try:
            ranks, task, args, kwargs = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = True, task(groups[ranks], *args, **kwargs)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


@contextlib.contextmanager
def crew(size: int, timeout: float = 60.0) -> Iterator[Crew]:
    """A crew of their own, for tasks that end badly."""
    made = Crew(size, timeout)
    try:
        yield made
    finally:
        made.close()
