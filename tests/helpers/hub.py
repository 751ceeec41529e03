"""A server on this machine in place of the Hub."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import huggingface_hub
import pytest
from transformers.utils import hub as transformers_hub

URL = f"{huggingface_hub.constants._HF_DEFAULT_ENDPOINT}/user/adapter"
COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as uploads and downloads of one repository with small files need."""

    files: dict[str, bytes]
    requests: list[tuple[str, str | None]]  # path, authorization

    def answer(self, body: bytes | dict[str, Any], status: int = 200, **headers: str) -> None:
        self.requests.append((self.path, self.headers.get("Authorization")))
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        if size:
            body = self.rfile.read(size)
        else:
            body = b""
            while length := int(self.rfile.readline(), 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        if self.path.endswith("/preupload/main"):
            wanted = json.loads(body)["files"]
            return self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]}
            )
        if "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self.answer({"success": True, "commitOid": COMMIT, "commitUrl": f"{URL}/commit/0"})
        return self.answer({"url": URL, "id": "user/adapter"})

    def do_GET(self) -> None:
        _, found, name = self.path.partition("/resolve/")
        if not found:
            files = [{"rfilename": name} for name in self.files]
            return self.answer({"id": "user/adapter", "sha": COMMIT, "siblings": files, "name": "user", "type": "user"})
        data = self.files.get(name.partition("/")[2])
        if data is None:
            return self.answer({}, 404, X_Error_Code="EntryNotFound")
        return self.answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serve_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """Within this context, the Hub is a server on this machine that has one repository, empty at first."""
    handler = type("OneHub", (Hub,), {"files": {}, "requests": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        files = address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        patch.setattr(huggingface_hub.hf_api, "ENDPOINT", address, raising=False)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
        patch.setattr(transformers_hub, "_hf_api", None, raising=False)  # cached by an earlier call to the Hub
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        try:
            yield handler
        finally:
            server.shutdown()
            server.server_close()
