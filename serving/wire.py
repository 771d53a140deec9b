"""Control messages between the front and its engine processes: lines of JSON over TCP. Tensors never travel here.

Either end proves first that it knows a key which the front made up at its start, so nobody else who reaches the port
is obeyed; messages are not encrypted. The engines' end is a thread that fills an inbox, the front's end is asyncio.
Both give signs of life (pulse.py), and a connection whose other end gives none is ended.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import queue
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Protocol

from model.sampling import Sampling
from serving.pulse import BEATS, Quiet, every_beat
from serving.sequence import Request

Message = dict[str, Any]
LIMIT = 1 << 26  # bytes of a message
GONE: Message = {"kind": "gone"}  # put into the inbox when the connection has ended
ALIVE: Message = {"kind": "alive"}  # a sign of life, which nobody else gets to see
SILENCE = 20.0  # seconds without a sign of life after which the other end counts as lost
_SECONDS = 30  # for both proofs


class NotTrusted(ConnectionError):
    """The other end does not know the key."""


def encode_request(request: Request) -> Message:
    return {**asdict(request), "prompt": list(request.prompt)}


def decode_request(message: Message) -> Request:
    return Request(**{**message, "prompt": tuple(message["prompt"]), "sampling": Sampling(**message["sampling"])})


class Channel:
    """An engine's end: `send` from any thread, `inbox` gets what the front says, and GONE at the end.

    divert   asked about every message in the thread that reads; True: it is dealt with, and does not go to the inbox
    """

    def __init__(self, host: str, port: int, key: str, hello: Message, silence: float = SILENCE) -> None:
        """Connects and proves. hello: who this is. Raises OSError or NotTrusted."""
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.divert: Callable[[Message], bool] = lambda message: False
        self._socket = socket.create_connection((host, port), timeout=_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")
        self._lock = threading.Lock()
        challenge = secrets.token_hex()
        self.send({"challenge": challenge})
        answer = self._read() or {}
        if not hmac.compare_digest(str(answer.get("proof")), _proof(key, "front", challenge)):
            raise NotTrusted(f"whoever listens on {host}:{port} does not know the key")
        self.send({**hello, "proof": _proof(key, "engine", str(answer["challenge"]))})
        self._socket.settimeout(None)
        self._quiet = Quiet()
        every_beat(silence, self._beat)
        threading.Thread(target=self._receive, name="channel", daemon=True).start()

    def send(self, message: Message) -> None:
        """What is sent to a front that is gone is lost; the inbox will say that it is."""
        data = _line(message)
        with self._lock, suppress(ConnectionError):
            self._socket.sendall(data)

    def _beat(self) -> bool:
        """Give a sign of life, and look for one. False when the connection is no use any more."""
        try:
            if self._quiet.beat():
                self._socket.shutdown(socket.SHUT_RDWR)  # ends the thread that reads, and one that is just sending
                return False
            if self._lock.acquire(blocking=False):  # else somebody is sending: sign enough
                try:
                    self._socket.sendall(_line(ALIVE))
                finally:
                    self._lock.release()
        except OSError:
            return False
        return True

    def _read(self) -> Message | None:
        line = self._file.readline(LIMIT)
        return dict(json.loads(line)) if line else None

    def _receive(self) -> None:
        try:
            while (message := self._read()) is not None:
                self._quiet.heard()
                if message != ALIVE and not self.divert(message):
                    self.inbox.put(message)
        except (OSError, ValueError):
            pass
        finally:
            self.inbox.put(GONE)


class Peer:
    """An engine as the front sees it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    def send(self, message: Message) -> None:
        """Never waits; what was sent to somebody who is gone is lost."""
        if not self._writer.is_closing():
            self._writer.write(_line(message))

    def close(self) -> None:
        self._writer.close()

    def abort(self) -> None:
        """As `close`, without waiting until everything has been sent."""
        self._writer.transport.abort()


class Listener(Protocol):
    """What happens to an engine's connection, in the front's event loop."""

    def joined(self, peer: Peer, hello: Message) -> None: ...

    def received(self, peer: Peer, message: Message) -> None: ...

    def left(self, peer: Peer, fate: str) -> None:
        """fate: what has become of it, as the end of a sentence."""


async def listen(host: str, port: int, key: str, listener: Listener, silence: float = SILENCE) -> asyncio.Server:
    """Accept engines from now on; port 0: any free one."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(writer)
        try:
            hello = await asyncio.wait_for(_prove(reader, peer, key), _SECONDS)
        except (TimeoutError, NotTrusted, OSError, ValueError, KeyError):
            writer.close()
            return
        listener.joined(peer, hello)
        quiet = Quiet()
        pulse = asyncio.create_task(_pulse(peer, quiet, silence))
        try:
            while line := await reader.readline():
                quiet.heard()
                if (message := json.loads(line)) != ALIVE:
                    listener.received(peer, message)
        except (OSError, ValueError):
            pass
        finally:
            silent = pulse.done()
            pulse.cancel()
            listener.left(peer, f"has given no sign of life for {silence:g} s" if silent else "has died")
            writer.close()

    return await asyncio.start_server(serve, host, port, limit=LIMIT)


async def _pulse(peer: Peer, quiet: Quiet, silence: float) -> None:
    """Give signs of life until the other end has given none for too long; then end the connection."""
    while not quiet.beat():
        peer.send(ALIVE)
        await asyncio.sleep(silence / BEATS)
    peer.abort()


async def _prove(reader: asyncio.StreamReader, peer: Peer, key: str) -> Message:
    first = json.loads(await reader.readline())
    challenge = secrets.token_hex()
    peer.send({"proof": _proof(key, "front", str(first["challenge"])), "challenge": challenge})
    hello: Message = json.loads(await reader.readline())
    if not hmac.compare_digest(str(hello.pop("proof")), _proof(key, "engine", challenge)):
        raise NotTrusted("an engine does not know the key")
    return hello


def _proof(key: str, who: str, challenge: str) -> str:
    return hmac.new(key.encode(), f"{who} {challenge}".encode(), "sha256").hexdigest()


def _line(message: Message) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"
