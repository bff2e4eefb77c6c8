"""The connections by which the processes of a run know of each other: a star around rank 0, kept by a thread each."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from subprocess import Popen
from typing import Any

BEAT = 5.0  # seconds between signs of life
POLL = 0.2  # seconds between looks into the store
OWN = 0.5  # seconds in which a process may turn out to have failed as well, and has its own story to tell
GRACE = 5.0  # seconds in which a process may end by itself, once another one has failed
PATIENCE = 60.0  # seconds in which the others follow a rank that left by itself
GREETING = 10.0  # seconds in which a connection is made, and a new one must say who it is


class Links(threading.Thread):
    """Hear of the other processes' failures, and end this one after them.

    Args:
        rank: of this process.
        world: number of processes.
        store: the process group's; rank 0 leaves its port in it.
        host: where rank 0 is; on 127.0.0.1 it listens there only.
        silence: seconds without a sign of life after which a rank is taken for lost.
        children: processes that this one has started and that nobody else would end.
    """

    def __init__(
        self, rank: int, world: int, store: Any, host: str, silence: float, children: Iterable[Popen[Any]]
    ) -> None:
        super().__init__(name="rank-links", daemon=True)
        self.rank, self.world, self.store, self.host = rank, world, store, host
        self.silence, self.children = silence, children
        self.leaving = False  # this process ends by itself
        self.failed, self.failure = threading.Event(), ""
        self._ready = threading.Event()
        self._server: asyncio.Server | None = None
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._names: dict[int, str] = {}
        self._places: dict[int, str] = {}
        self._heard: dict[int, float] = {}  # when

    # -- for the main thread ---------------------------------------------------------------------------------------

    def named(self, text: str) -> str:
        """``text`` with the name of this rank before it."""
        return f"{self._me()}: {text}"

    def tell(self, word: str, text: str = "") -> None:
        """Send a word to everyone connected, within two seconds or not at all."""
        self._await(self._send(word, text, *self._writers))

    def close(self) -> None:
        """End the thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._over.set)
        self.join(2)

    def whereabouts(self) -> str:
        """Where the other ranks' main threads were last, as far as this one is connected to them."""
        return "; ".join(f"{self._names[rank]}: {at}" for rank, at in sorted(self._places.items()))

    def _await(self, job: Any) -> None:
        if not self._ready.wait(2):
            job.close()
            return
        with contextlib.suppress(RuntimeError, TimeoutError, asyncio.TimeoutError):
            asyncio.run_coroutine_threadsafe(job, self._loop).result(2)

    # -- the thread ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Keep the connections until the run is over."""
        asyncio.run(self._keep())

    async def _keep(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        jobs = [
            asyncio.create_task(self._serve() if self.rank == 0 else self._join()),
            asyncio.create_task(self._beat()),
        ]
        await self._over.wait()
        for job in jobs:
            job.cancel()
        if self._server is not None:
            self._server.close()
        for writer in self._writers.values():
            writer.close()

    async def _serve(self) -> None:
        """Rank 0: let the others connect; until all have, look whether one has failed before."""
        self._token = secrets.token_hex(16)
        listener = listening(everywhere=self.host != "127.0.0.1")
        self._server = await asyncio.start_server(self._greet, sock=listener)
        self.store.set("address", json.dumps([listener.getsockname()[1], self._token]))
        while len(self._names) < self.world - 1:
            await self._look("failed")
            await asyncio.sleep(POLL)

    async def _join(self) -> None:
        """The other ranks: connect to rank 0."""
        while not await self._look("address"):
            await self._look("failed")
            await asyncio.sleep(POLL)
        port, token = json.loads(self.store.get("address"))
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(self.host, port), GREETING)
        except (OSError, asyncio.TimeoutError) as error:
            print(f"rank {self.rank} is not watched: {self.host}:{port} {error!r}", file=sys.stderr, flush=True)
            return
        writer.write(json.dumps([token, self.rank, self._me()]).encode() + b"\n")
        await self._read(0, f"rank 0 of {self.world} ({self.host})", reader, writer)

    async def _look(self, key: str) -> bool:
        """Whether a key stands in the store; a failure that does is heard."""
        try:
            found = self.store.check([key])
            if found and key == "failed":
                self._hear(self.store.get(key).decode())
        except RuntimeError:  # its server has ended
            self._hear(f"rank 0 of {self.world}: its process has ended")
            found = False
        return found

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Rank 0: take in a connection that knows the token."""
        try:
            token, rank, name = json.loads(await asyncio.wait_for(reader.readline(), GREETING))
            known = secrets.compare_digest(str(token), self._token)
        except (ValueError, TypeError, OSError, asyncio.TimeoutError):
            known = False
        if known:
            await self._read(int(rank), str(name), reader, writer)
        else:
            writer.close()

    async def _read(self, rank: int, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Listen to a rank until it says goodbye, leaves or fails."""
        self._writers[rank], self._names[rank], self._heard[rank] = writer, name, time.monotonic()
        try:
            while line := await reader.readline():
                self._heard[rank] = time.monotonic()
                word, text = json.loads(line)
                if word == "at":
                    self._places[rank] = text
                elif word == "failed":
                    self._hear(text)
                else:
                    if word == "left":
                        self._loop.call_later(PATIENCE, self._hear, f"{text}, and this process did not")
                    return
            self._hear(f"{name}: its process has ended without a word (killed, out of memory?)")
        except OSError as error:
            self._hear(f"{name}: the connection broke ({error})")
        finally:
            for known in (self._heard, self._places, self._writers):
                known.pop(rank, None)
            writer.close()

    async def _beat(self) -> None:
        """Send signs of life; miss those of the others."""
        every, last, main = min(BEAT, self.silence / 4), time.monotonic(), threading.main_thread().ident
        while True:
            frame = sys._current_frames().get(main or 0)
            await self._send("at", place(traceback.extract_stack(frame)), *self._writers)
            await asyncio.sleep(every)
            now = time.monotonic()
            held_up, last = now - last - every, now
            for rank, heard in self._heard.items():
                self._heard[rank] = heard = heard + max(0.0, held_up)  # as long as this process slept itself
                if now - heard > self.silence:
                    at = f"; it was at {self._places[rank]}" if self._places.get(rank) else ""
                    self._hear(f"{self._names[rank]}: no sign of life for {now - heard:.0f} seconds{at}")

    async def _send(self, word: str, text: str, *ranks: int) -> None:
        line = json.dumps([word, text]).encode() + b"\n"
        writers = [self._writers[rank] for rank in ranks if rank in self._writers]
        for writer in writers:
            writer.write(line)
        if word != "at":  # one that is stopped reads nothing: nobody waits for it
            await asyncio.gather(*(writer.drain() for writer in writers), return_exceptions=True)

    def _hear(self, text: str) -> None:
        """A rank has failed: let the others know, and end this process if it does not end by itself."""
        if not self.failure:
            self.failure = text
            self.failed.set()
            self._ending = self._loop.create_task(self._end())

    async def _end(self) -> None:
        await self._send("failed", self.failure, *self._writers)
        await asyncio.sleep(OWN)
        if not self.leaving:
            print(f"{self._me()} stops, because of {self.failure}", file=sys.stderr, flush=True)
            await asyncio.sleep(GRACE)
        if not self.leaving:
            for child in self.children:
                child.kill()
            sys.stdout.flush()
            os._exit(1)  # the main thread may be where no exception reaches it

    def _me(self) -> str:
        return f"rank {self.rank} of {self.world} ({socket.gethostname()}, process {os.getpid()})"


def listening(everywhere: bool) -> socket.socket:
    """A listening socket at a port of the system's choice.

    Args:
        everywhere: for other machines too, by IPv4 and IPv6 at the one port; asyncio would take one port for each.
    """
    if not everywhere:
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def place(frames: traceback.StackSummary) -> str:
    """The innermost line of code that belongs to no library: file, line and function; empty where there is none.

    Args:
        frames: of a stack or a traceback, the innermost last.
    """
    libraries = (sysconfig.get_paths()["stdlib"], "<frozen")
    for frame in reversed(frames):
        folders = Path(frame.filename).parts
        foreign = {"torch", "lightning", "transformers"} & {*folders} and "site-packages" in folders
        if not foreign and ("site-packages" in folders or not frame.filename.startswith(libraries)):
            return f"{frame.filename}:{frame.lineno} in {frame.name}"
    return ""
