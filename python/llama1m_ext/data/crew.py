"""Processes that tokenise batches side by side; results come in the order of the batches."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np

from .encode import Encoder
from .worker import receive, send

Batch = TypeVar("Batch")


class Crew(Generic[Batch]):
    """Encodes in so many processes of their own; with one worker in this process.

    They are not forks, so a tokenizer's threads do no harm, and not `multiprocessing`'s, so a script needs no
    `if __name__ == "__main__"`. They end with this process, however that ends.

    Args:
        encoder: what all of them do.
        workers: how many.
        texts_of: the texts of a batch.
    """

    def __init__(self, encoder: Encoder, workers: int, texts_of: Callable[[Batch], Sequence[str]]) -> None:
        self.encoder, self._texts_of = encoder, texts_of
        self._workers = workers
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self._told: set[int] = set()

    def __enter__(self) -> Crew[Batch]:
        if self._workers > 1:
            # Its own imports find what ours find, and it has no use for the patch.
            path = os.pathsep.join(dict.fromkeys(entry or os.getcwd() for entry in sys.path))
            mine = {**os.environ, "PYTHONPATH": path, "LLAMA1M_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
            command = [sys.executable, "-m", f"{__package__}.worker"]
            self._threads = ThreadPoolExecutor(self._workers)
            for _ in range(self._workers):
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=mine)
                self._processes.append(process)
                self._idle.put(process)
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except BrokenPipeError:
                        pass

    def map(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, list[np.ndarray]]]:
        """Each batch with its tokens. Two batches for each worker are read ahead; what goes wrong there is raised when its
        turn comes, as with one worker, and maybe never.

        Raises:
            RuntimeError: a process failed or was killed.
        """
        if self._threads is None:
            for batch in batches:
                texts = self._texts_of(batch)
                yield batch, self.encoder(texts) if texts else []
            return
        under_way: deque[tuple[Batch, Future[list[np.ndarray]]]] = deque()
        more, wrong = True, None
        while more or under_way:
            while more and len(under_way) < 2 * self._workers:
                try:
                    batch = next(batches)
                except StopIteration:
                    more = False
                except Exception as error:
                    more, wrong = False, error
                else:
                    under_way.append((batch, self._threads.submit(self._encode, self._texts_of(batch))))
            if under_way:
                first, future = under_way.popleft()
                yield first, future.result()
        if wrong is not None:
            raise wrong

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not texts:
            return []
        process = self._idle.get()
        try:
            assert process.stdin is not None and process.stdout is not None
            if process.pid not in self._told:
                send(process.stdin, self.encoder)
                self._told.add(process.pid)
            send(process.stdin, texts)
            reply: Any = receive(process.stdout)
        except (EOFError, OSError):
            code = process.wait()
            why = "; out of memory?" if code == -signal.SIGKILL else ""
            raise RuntimeError(f"a process that tokenises ended with {code}{why}") from None
        finally:
            self._idle.put(process)
        if isinstance(reply, str):
            raise RuntimeError(f"a worker could not tokenise:\n{reply}")
        return list(reply)
