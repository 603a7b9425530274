"""As much of a W&B server as one run needs: it keeps history by run, can go away and come back, and remembers meanwhile."""

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
        lines: By run, what was sent as history, by its place.
        ends: By run, what its ends have said: exit codes, and whether it was marked as preempting.
    """

    def __init__(self) -> None:
        self.lines: dict[str, dict[int, dict[str, Any]]] = {}
        self.ends: dict[str, list[dict[str, Any]]] = {}
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        os.register_at_fork(after_in_child=self._close)  # else a forked rank would hold the port, and nobody would answer

    def __enter__(self) -> "WandbServer":
        self.come()
        return self

    def __exit__(self, *_: object) -> None:
        self.go()

    @property
    def env(self) -> dict[str, str]:
        """What leads W&B here."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self._port}", "WANDB_API_KEY": _KEY, "WANDB_MODE": "online"}

    def come(self) -> None:
        """Begin to answer; on the port of before."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), _handler(self))
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def go(self) -> None:
        """Answer no more."""
        if self._server is not None:
            self._server.shutdown()
            self._close()

    def _close(self) -> None:
        if self._server is not None:
            self._server.server_close()
            self._server = None

    def history(self, run: str) -> list[dict[str, Any]]:
        """The rows of a run, in their order."""
        lines = self.lines.get(run, {})
        return [lines[place] for place in sorted(lines)]

    def answer(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        """To a question about a run, or to a part of its history."""
        if path != "/graphql":
            return self._stream(path.split("/")[-2], content)
        asked, given = content["query"], content.get("variables") or {}
        owner = {"id": "e", "name": "me"}
        if "RunResumeStatus" in asked:
            return {"model": {"id": "p", "name": "lockstep", "entity": owner, "bucket": self._bucket(given["name"])}}
        if "UpsertBucket" in asked:
            new = given["name"] not in self.lines
            self.lines.setdefault(given["name"], {})
            project = {"id": "p", "name": given["project"], "entity": owner}
            return {"upsertBucket": {"bucket": {**(self._bucket(given["name"]) or {}), "project": project}, "inserted": new}}
        if "CreateRunFiles" in asked:
            files = [{"name": name, "uploadUrl": f"{self.env['WANDB_BASE_URL']}/put/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "Viewer" in asked:
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
            told: dict[str, Any] = {}
            if self.command == "POST" and body.startswith(b"{"):  # others are telemetry
                told = server.answer(self.path, json.loads(body))
            reply = json.dumps({"data": told}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        do_GET = do_HEAD = do_POST = do_PUT = _answer

        def log_message(self, *_: object) -> None:
            pass

    return Handler
