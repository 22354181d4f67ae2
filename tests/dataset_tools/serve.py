"""A web server on this machine that gives out the files of a folder: no test needs a network."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Server:
    """`requests` are (path, Range header or None). `cut`: bytes of a body after which the connection is closed."""

    folder: Path
    ranges: bool = True
    cut: int | None = None
    url: str = ""
    requests: list[tuple[str, str | None]] = field(default_factory=list)


@contextlib.contextmanager
def serving(folder: Path, *, ranges: bool = True, cut: int | None = None) -> Iterator[Server]:
    server = Server(folder, ranges, cut)

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            answer(server, self)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        server.url = f"http://127.0.0.1:{httpd.server_address[1]}/"
        try:
            yield server
        finally:
            httpd.shutdown()
            thread.join()


def answer(server: Server, handler: http.server.BaseHTTPRequestHandler) -> None:
    wanted = handler.headers.get("Range")
    server.requests.append((handler.path, wanted))
    path = server.folder / urllib.parse.unquote(handler.path).lstrip("/")
    if not path.is_file():
        handler.send_error(404)
        return
    body = path.read_bytes()
    start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
    if start and start >= len(body):
        handler.send_error(416)
        return
    handler.send_response(206 if start else 200)
    handler.send_header("Content-Length", str(len(body) - start))
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
    handler.end_headers()
    handler.wfile.write(body[start:][: server.cut])


def nobody() -> str:
    """An address where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}/"
