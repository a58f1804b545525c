"""Nodes that are none: network namespaces on one machine, joined by links whose speed is set (Linux; iproute2, util-linux).

As root, or as anybody where user namespaces are allowed. Nothing outside the namespaces changes, and they live only as long as the
processes in them, which end with this one, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from types import TracebackType

__all__ = ["Nodes", "Unavailable"]

MTU = "9000"


class Unavailable(RuntimeError):
    """This machine can't make namespaces, or limit a link; the message says why."""


class Nodes:
    """So many nodes, each with an address on every rail; a rail is a switch that each node has one link to.

    Use as a context manager.

    Args:
        nodes: 1 to 250.
        rails: 1 to 250.

    Raises:
        Unavailable: on entry.
    """

    def __init__(self, nodes: int, rails: int) -> None:
        for name, n in (("nodes", nodes), ("rails", rails)):
            if not 1 <= n <= 250:
                raise ValueError(f"{name}: expected 1 to 250, got {n}")
        self.nodes, self.rails = nodes, rails
        self._holders: list[subprocess.Popen[bytes]] = []
        self._user = False

    def __enter__(self) -> Nodes:
        missing = [name for name in ("ip", "tc", "unshare", "nsenter") if _program(name) is None]
        if missing:
            raise Unavailable(
                f"expected the programs ip, tc (iproute2), unshare and nsenter, got no {', '.join(missing)}"
            )
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def interface(self, rail: int) -> str:
        """The name of a node's interface on a rail."""
        return f"eth{rail}"

    def inside(self, node: int, words: list[str]) -> list[str]:
        """A command that runs on a node."""
        return self._inside(self._holders[1 + node], words)

    def limit(self, rate: float | None) -> None:
        """Sets what each link carries, in each direction.

        Args:
            rate: bytes/s; None: as much as the machine can.
        """
        for node in range(self.nodes):
            for rail in range(self.rails):
                ends = ((1 + node, self.interface(rail)), (0, f"n{node}r{rail}"))
                for at, device in ends:
                    words = [_found("tc"), "qdisc"]
                    if rate is None:
                        self._run(at, [*words, "del", "dev", device, "root"], ignore=True)
                        continue
                    # Bursts of 2 ms, so that small blocks are slow, too. Nothing is dropped: TCP's recovery is not what
                    # fabrics with flow control between GPUs have.
                    burst = max(16384, int(rate / 500))
                    bucket = ["tbf", "rate", f"{int(rate * 8)}bit", "burst", str(burst), "limit", str(64 << 20)]
                    self._run(at, [*words, "replace", "dev", device, "root", *bucket])

    def close(self) -> None:
        """Ends the namespaces; processes that run in them keep theirs until they end."""
        holders, self._holders = self._holders, []
        for process in holders:
            process.kill()
        for process in holders:
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()

    def _make(self) -> None:
        reasons = []
        for self._user in (False, True) if os.geteuid() == 0 else (True,):
            try:
                self._hold(["--user", "--map-root-user"] if self._user else [])
                break
            except Unavailable as e:
                reasons.append(str(e))
        else:
            raise Unavailable("; ".join(reasons))
        ip = _found("ip")
        for rail in range(self.rails):
            self._run(0, [ip, "link", "add", f"rail{rail}", "type", "bridge"])
            self._run(0, [ip, "link", "set", f"rail{rail}", "up"])
        for node in range(self.nodes):
            self._hold([])
            at = 1 + node
            self._run(at, [ip, "link", "set", "lo", "up"])
            for rail in range(self.rails):
                there, here = self.interface(rail), f"n{node}r{rail}"
                pid = str(self._holders[at].pid)
                # Jumbo frames, as between GPUs; frames of 1500 bytes took half of the CPU time.
                ends = [here, "mtu", MTU, "type", "veth", "peer", "name", there, "mtu", MTU, "netns", pid]
                self._run(0, [ip, "link", "add", *ends])
                self._run(0, [ip, "link", "set", here, "master", f"rail{rail}", "up"])
                self._run(at, [ip, "link", "set", there, "up"])
                self._run(at, [ip, "addr", "add", f"10.77.{rail}.{node + 1}/24", "dev", there])
            # What comes over one rail may be answered over another.
            off = "for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 > $f; done"
            self._run(at, ["sh", "-c", off], ignore=True)

    def _hold(self, more: list[str]) -> None:
        """A process in a network namespace of its own, which ends when its input does."""
        words = [_found("unshare"), *more, "--net", "cat"]
        if self._user and self._holders:
            words = [_found("nsenter"), "-t", str(self._holders[0].pid), "-U", "--preserve-credentials", *words]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert process.stderr is not None
        deadline = time.monotonic() + 10
        while _program_of(process.pid) != "cat":
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                said = process.stderr.read().decode(errors="replace").strip()
                raise Unavailable(f"{' '.join(['unshare', *more, '--net'])}: {said or 'no answer within 10 s'}")
            time.sleep(0.01)
        self._holders.append(process)

    def _inside(self, holder: subprocess.Popen[bytes], words: list[str]) -> list[str]:
        user = ["-U", "--preserve-credentials"] if self._user else []
        return [_found("nsenter"), "-t", str(holder.pid), *user, "-n", *words]

    def _run(self, at: int, words: list[str], ignore: bool = False) -> None:
        done = subprocess.run(self._inside(self._holders[at], words), capture_output=True, encoding="utf-8")
        if done.returncode and not ignore:
            raise Unavailable(f"{' '.join(words)}: {done.stderr.strip() or done.returncode}")


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")


def _found(name: str) -> str:
    found = _program(name)
    assert found is not None
    return found


def _program_of(pid: int) -> str:
    """What a process runs; the namespace is there once `unshare` has become `cat`."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""
