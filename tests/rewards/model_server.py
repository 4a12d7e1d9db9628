"""A local server that speaks a model server's protocol, well and badly, and remembers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any]


class Server(ThreadingHTTPServer):
    """Answers by `reply(request, how many times this request came)`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply: Callable[[dict[str, Any], int], Reply] = lambda *_: grade(7)
        self.requests: list[dict[str, Any]] = []
        self.paths: set[str] = set()
        self.headers: list[str] = []
        self.lock = threading.Lock()
        self.now = self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(request)
            server.paths.add(self.path)
            server.headers.append(self.headers["Authorization"])
            count = server.requests.count(request)
            server.now += 1
            server.most = max(server.most, server.now)
        status, body = server.reply(request, count)
        data = json.dumps(body).encode()
        with server.lock:
            server.now -= 1
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            return  # the judge gave up

    def log_message(self, *_: Any) -> None:
        pass


def says(content: Any) -> Reply:
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return 200, {
        "id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]
    }  # fmt: skip


def grade(score: Any, reason: str = "because") -> Reply:
    return says(json.dumps({"reason": reason, "score": score}))
