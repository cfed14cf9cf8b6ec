"""The calls of the Hugging Face hub that pushing and pulling a model need, on this machine."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_a_token_that_nobody_may_see"


class HubServer(ThreadingHTTPServer):
    """Repositories in memory: a commit changes the files of one as a whole, and large files are sent before it.

    Attributes:
        repositories: `user/name` -> path -> content.
        large: sha256 -> content of the large files that arrived.
        sent: sha256 of each large file, as often as it was sent.
        waits_at: the number of a large file (counted from 1) whose answer never comes; `waiting` says that it is asked.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.waits_at = 0
        self.waiting, self.released = threading.Event(), threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, error: str = "") -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do(self) -> None:
        try:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        except ConnectionError:  # the client was killed
            self.close_connection = True
            return None
        path, hub = unquote(urlsplit(self.path).path), self.server
        writes = self.command in ("POST", "PUT") and not path.startswith("/lfs/") and "paths-info" not in path
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "you have no rights here"}, 403)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in hub.repositories else 200
            hub.repositories.setdefault(name, {".gitattributes": b""})
            return self.answer({"url": f"{hub.url}/{name}"}, status)
        if path == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---\n")[1]
            return self.answer({"errors": [], "warnings": []}, 200 if isinstance(yaml.safe_load(front), dict) else 400)
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            hub.sent.append(match[1])
            if len(hub.sent) == hub.waits_at:
                hub.waiting.set()
                hub.released.wait(60)
                self.close_connection = True
                return None
            right = hashlib.sha256(body).hexdigest() == match[1]
            if right:
                hub.large[match[1]] = body
            return self.answer({}, 200 if right else 400)
        match = re.match(r"/(?:api/models/)?([\w.-]+/[\w-]+)(?:\.git)?(?:/|$)(.*)", path)
        assert match is not None, path
        if match[1] not in hub.repositories:
            return self.answer({"error": "Repository not found"}, 404, "RepoNotFound")
        return self.repository(hub.repositories[match[1]], match[1], match[2], body)

    do_GET = do_HEAD = do_POST = do_PUT = do

    def repository(self, files: dict[str, bytes], name: str, call: str, body: bytes) -> None:
        hub = self.server
        if call.startswith("preupload/"):
            asked = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            answers = [
                {
                    "path": file["path"],
                    "uploadMode": modes[file["path"].endswith(".safetensors")],
                    "shouldIgnore": False,
                }
                for file in asked
            ]
            return self.answer({"files": answers})
        if call == "info/lfs/objects/batch":
            objects = [
                {**asked, "actions": {"upload": {"href": f"{hub.url}/lfs/{asked['oid']}"}}}
                if asked["oid"] not in hub.large
                else asked
                for asked in json.loads(body)["objects"]
            ]
            return self.answer({"objects": objects, "transfer": "basic"})
        if call.startswith("commit/"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            return self.answer({"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1"})
        if call.startswith("resolve/"):
            path = call.split("/", 2)[2]
            return self.answer(files[path]) if path in files else self.answer({}, 404, "EntryNotFound")
        if call.startswith("tree/"):
            folder = "/".join(call.split("/")[2:])
            recursive = "recursive=true" in self.path.lower()
            inside = [path for path in files if not folder or path.startswith(f"{folder}/")]
            if not inside:
                return self.answer({"error": "no such folder"}, 404, "EntryNotFound")
            return self.answer(list(self.entries(files, inside, folder, recursive)))
        return self.answer({"id": name, "sha": "1", "siblings": []})

    def entries(
        self, files: dict[str, bytes], paths: list[str], folder: str, recursive: bool
    ) -> Iterator[dict[str, Any]]:
        folders = set()
        for path in paths:
            rest = path[len(folder) :].lstrip("/")
            parts = rest.split("/")
            below = [path[: len(path) - len(rest)] + "/".join(parts[:count]) for count in range(1, len(parts))]
            folders |= set(below if recursive else below[:1])
            if recursive or len(parts) == 1:
                digest = hashlib.sha1(files[path]).hexdigest()
                yield {"type": "file", "path": path, "size": len(files[path]), "oid": digest}
        yield from ({"type": "directory", "path": path, "size": 0, "oid": "0"} for path in sorted(folders))


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    """A hub that answers until the block ends."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
