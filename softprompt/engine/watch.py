"""Notices at once that a process of a run has ended, also while the others compute for minutes.

Every process holds a connection to the first one. The system closes a process's connections with it, however it ends; where a whole machine
vanishes, TCP's keepalive says so.
"""

import logging
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

GRACE = 5.0  # seconds that a process has to come to an end by itself once another is gone
REACH = 20.0  # seconds until all are connected
ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a machine is given up after 25 seconds
BYE, FAILED = b".", b"!"  # said by a process that may end; by one that ends with an error, which it says itself
HELLO = 16 + 8  # bytes: what only processes of the run know, and a rank

Told = Callable[[Callable[[], list[object]]], list[object]]


class Watch:
    """The connections of a process, by the rank at their other end. `sentence`: what is said when a process is gone."""

    def __init__(self, lines: Mapping[int, socket.socket], sentence: Callable[[int | None], str]) -> None:
        self._lines, self._sentence = lines, sentence
        self._over, self._found = threading.Event(), threading.Event()
        self._gone: int | None = None
        self._failed = False
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def gone(self, seconds: float) -> int | None:
        """The process that is gone, which may take a moment to be known; None where it stays unknown."""
        self._found.wait(seconds if self._lines else 0)
        return self._gone

    def failed(self, seconds: float) -> bool:
        """Whether it was the first one, with an error that it says itself."""
        return self.gone(seconds) == 0 and self._failed

    def close(self, *, well: bool) -> None:
        """Looks no further. `well`: all have come to their end; otherwise the others are to end too."""
        if self._over.is_set():
            return
        self._over.set()
        for line in self._lines.values():
            with suppress(OSError):
                line.sendall(BYE if well else FAILED)
                line.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join(1.0)
        for line in self._lines.values():
            line.close()

    def _look(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, line in self._lines.items():
                selector.register(line, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    said = _read(self._lines[key.data])
                    if self._over.is_set():
                        return
                    if not said.startswith(BYE):
                        self._failed = said.startswith(FAILED)
                        named = said.rstrip(FAILED)  # by the first one, which may end with an error for that reason
                        return self._lose(int(named) if named else key.data)
                    selector.unregister(key.fileobj)

    def _lose(self, rank: int) -> None:
        """Tells the others which process is gone, and ends this one unless it does so itself: it may be in a product that takes minutes."""
        self._gone = rank
        for line in self._lines.values():
            with suppress(OSError):
                line.sendall(str(rank).encode())
        self._found.set()  # now this process may end: the others would else take it for the one that is gone
        if not self._over.wait(GRACE):
            if not self.failed(0):
                print(f"error: {self._sentence(rank)}", file=sys.stderr, flush=True)
            os._exit(2)


def _read(line: socket.socket) -> bytes:
    """What was said; nothing where the process or its machine is gone."""
    with suppress(OSError):
        return line.recv(16)
    return b""


@contextmanager
def watching(rank: int, size: int, address: str, told: Told, sentence: Callable[[int | None], str]) -> Iterator[Watch]:
    """A watch over the processes of a run, of which the first one can be reached at `address`. `told`: of World.

    A process that does not reach the first one goes on; that another has ended is then noticed when they next talk.
    """
    both: dict[str, Any] = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    with socket.create_server(("", 0), backlog=size, **both) if rank == 0 else socket.socket() as server:
        port, secret = told(lambda: [server.getsockname()[1], secrets.token_hex(8)])
        try:
            lines = _accepted(server, size, str(secret)) if rank == 0 else {0: _connected(address, int(str(port)), f"{secret}{rank:08}")}
        except OSError as error:
            lines = {}
            logging.getLogger(__name__).warning("no connection to the first process at %s, port %s: %s", address, port, error)
    for line in lines.values():
        line.settimeout(None)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in ALIVE.items():
            if hasattr(socket, name):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    watch = Watch(lines, sentence)
    try:
        yield watch
    finally:
        watch.close(well=False)


def _accepted(server: socket.socket, size: int, secret: str) -> dict[int, socket.socket]:
    server.settimeout(REACH)
    lines: dict[int, socket.socket] = {}
    with suppress(TimeoutError):
        while len(lines) < size - 1:
            line, _ = server.accept()
            line.settimeout(REACH)
            with line.makefile("rb") as hello:
                said = hello.read(HELLO).decode("ascii", "replace")
            if said.startswith(secret):
                lines[int(said[len(secret) :])] = line
            else:
                line.close()
    return lines


def _connected(address: str, port: int, hello: str) -> socket.socket:
    line = socket.create_connection((address, port), timeout=REACH)
    line.sendall(hello.encode())
    return line
