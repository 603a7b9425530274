"""A W&B server that stores the history of runs, and can be stopped and started again."""

import gzip
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_KEY = "0123456789" * 4


class WandbServer:
    """A server on a loopback port.

    Attributes:
        lines: Rows of history, by run and index.
        ends: Exit codes and marks as preempting that were sent, by run.
        files: Content of uploaded files, by name.
    """

    def __init__(self) -> None:
        self.lines: dict[str, dict[int, dict[str, Any]]] = {}
        self.ends: dict[str, list[dict[str, Any]]] = {}
        self.files: dict[str, bytes] = {}
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        os.register_at_fork(after_in_child=self._close)  # or a forked rank would hold the port without answering

    def __enter__(self) -> "WandbServer":
        self.come()
        return self

    def __exit__(self, *_: object) -> None:
        self.go()

    @property
    def env(self) -> dict[str, str]:
        """Environment variables that make W&B use this server."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self._port}", "WANDB_API_KEY": _KEY, "WANDB_MODE": "online"}

    def come(self) -> None:
        """Start answering, on the same port each time."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), _handler(self))
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def go(self) -> None:
        """Stop answering."""
        if self._server is not None:
            self._server.shutdown()
            self._close()

    def _close(self) -> None:
        if self._server is not None:
            self._server.server_close()
            self._server = None

    def history(self, run: str) -> list[dict[str, Any]]:
        """The rows of a run, in order."""
        lines = self.lines.get(run, {})
        return [lines[place] for place in sorted(lines)]

    def answer(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        """The answer to a GraphQL query, or to a part of a run's history."""
        if path != "/graphql":
            return self._stream(path.split("/")[-2], content)
        query, variables = content["query"], content.get("variables") or {}
        owner = {"id": "e", "name": "me"}
        if "RunResumeStatus" in query:
            return {"model": {"id": "p", "name": "lockstep", "entity": owner, "bucket": self._bucket(variables["name"])}}
        if "UpsertBucket" in query:
            new = variables["name"] not in self.lines
            self.lines.setdefault(variables["name"], {})
            project = {"id": "p", "name": variables["project"], "entity": owner}
            return {
                "upsertBucket": {"bucket": {**(self._bucket(variables["name"]) or {}), "project": project}, "inserted": new}
            }
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.env['WANDB_BASE_URL']}/put/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "Viewer" in query:
            return {"viewer": {"id": "v", "flags": "{}", "entity": "me", "username": "me", "teams": {"edges": []}}}
        return {"serverInfo": {"features": []}}

    def _bucket(self, run: str) -> dict[str, Any] | None:
        if run not in self.lines:
            return None
        rows = self.history(run)
        return {
            "id": run,
            "name": run,
            "displayName": run,
            "config": "{}",
            "summaryMetrics": json.dumps(rows[-1] if rows else {}),
            "historyLineCount": len(rows),
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }

    def _stream(self, run: str, content: dict[str, Any]) -> dict[str, Any]:
        part = (content.get("files") or {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        for number, line in enumerate(part["content"]):
            self.lines[run][part["offset"] + number] = json.loads(line)
        if end := {name: content[name] for name in ("exitcode", "preempting") if content.get(name) is not None}:
            self.ends.setdefault(run, []).append(end)
        return {}


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            answer: dict[str, Any] = {}
            if self.command == "PUT":
                server.files[self.path.removeprefix("/put/")] = body
            if self.command == "POST" and body.startswith(b"{"):  # others are telemetry
                answer = server.answer(self.path, json.loads(body))
            reply = json.dumps({"data": answer}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        do_GET = do_HEAD = do_POST = do_PUT = _answer

        def log_message(self, *_: object) -> None:
            pass

    return Handler
