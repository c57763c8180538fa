"""A folder at a URL of 127.0.0.1, with failures of every kind."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOR_EVER = 1_000_000


@dataclass
class Server:
    """`failures` says what happens to the next requests of a file, by its name: a list of the kinds below.

    A number is a status; `reset` closes the connection in the middle of the body, `short` ends the body early, `wrong`
    flips a byte, and `stall` sends half of it and then nothing.
    """

    folder: Path
    url: str = ""
    failures: dict[str, list[str | int]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)

    def asked(self, ending: str) -> list[str]:
        """The requests of files whose names end so."""
        return [name for name in self.requests if name.endswith(ending)]


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve the folder while this context is open."""
    server = Server(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.lstrip("/")
            server.requests.append(name)
            planned = server.failures.get(name)
            failure = planned.pop(0) if planned else None
            path = folder / name
            if isinstance(failure, int) or not path.is_file():
                self.send_error(failure or 404)
                return
            body = path.read_bytes()
            if failure == "wrong":
                body = bytes([body[0] ^ 1]) + body[1:]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) // 2 if failure == "short" else len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if failure in ("short", "reset", "stall") else body)
            self.close_connection = failure == "reset"
            if failure == "stall":
                server.stalled.wait()
                self.close_connection = True

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        server.url = f"http://127.0.0.1:{listening.server_address[1]}"
        try:
            yield server
        finally:
            server.stalled.set()
            listening.shutdown()
            thread.join()
