"""A hub on this machine: its HTTP as `huggingface_hub` speaks it, with repositories as files on disk.

Repositories are created private or public; large files come first, through git-LFS's batch call and addresses
signed for one object, each checked by its SHA-256; commits come as NDJSON; what is there, of models and data
sets alike, is listed, resolved and downloaded by branch or commit. Nothing of the workbench is known here.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

_LFS = ("*.safetensors", "*.gguf", "*.model", "*.parquet", "*.bin")  # as in a new repository's .gitattributes
_LFS_BYTES = 10 * 2**20  # a larger file goes there whatever its name
_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _LFS).encode()


class RefusalError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Hub:
    """The repositories in `root`, who may enter by which token, and what was asked.

    Attributes:
        requests: "METHOD /path" of every request, in order.
        received: SHA-256 of every large object that came whole, in order.
        hold_after: so many large objects are taken; later ones wait until `hold` is set.
    """

    root: Path
    tokens: dict[str, str]
    requests: list[str] = field(default_factory=list)
    received: list[str] = field(default_factory=list)
    hold_after: int | None = None
    hold: threading.Event = field(default_factory=threading.Event)
    held: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    began: int = 0

    def repo(self, name: str) -> dict[str, Any]:
        """What is known of a repository: {"private", "commits": [{"oid", "title", "files"}]}."""
        path = self.root / "repos" / f"{name}.json"
        if not path.is_file():
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        return json.loads(path.read_text())

    def save(self, name: str, repo: dict[str, Any]) -> None:
        path = self.root / "repos" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(repo))

    def commit(self, repo: dict[str, Any], title: str, files: dict[str, Any]) -> str:
        parent = repo["commits"][-1]["oid"] if repo["commits"] else ""
        text = json.dumps([parent, title, files], sort_keys=True)
        oid = hashlib.sha1(text.encode()).hexdigest()
        repo["commits"].append({"oid": oid, "title": title, "files": files})
        return oid

    def at(self, name: str, revision: str) -> dict[str, Any]:
        commits = self.repo(name)["commits"]
        found = [c for c in commits if c["oid"] == revision] or (commits[-1:] if revision == "main" else [])
        if not found:
            raise RefusalError(404, "Invalid rev id", "RevisionNotFound")
        return found[0]

    def store(self, content: bytes) -> str:
        """Keep an object under its SHA-256."""
        digest = hashlib.sha256(content).hexdigest()
        self.object(digest).parent.mkdir(parents=True, exist_ok=True)
        self.object(digest).write_bytes(content)
        return digest

    def object(self, digest: str) -> Path:
        return self.root / "objects" / digest

    def file(self, content: bytes) -> dict[str, Any]:
        """The entry of a small file, which git itself keeps."""
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"sha256": self.store(content), "oid": blob, "size": len(content), "lfs": False}

    def sign(self, digest: str) -> str:
        return hmac.new(self.secret, digest.encode(), "sha256").hexdigest()

    def signed(self, digest: str) -> str:
        """An object's address for who is to send or fetch it, on another host than the hub's."""
        storage = self.url.replace("127.0.0.1", "localhost")
        return f"{storage}/lfs/{digest}?X-Amz-Signature={self.sign(digest)}"

    def content(self, name: str, path: str, revision: str = "main") -> bytes:
        """What a repository has at a path; for tests."""
        return self.object(self.at(name, revision)["files"][path]["sha256"]).read_bytes()


class Handler(BaseHTTPRequestHandler):
    """One connection; `hub` is set on the class that a server makes of it."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the hub keeps the requests."""

    def handle_one(self) -> None:
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        self.where = unquote(split.path)
        self.hub.requests.append(f"{self.command} {self.where}")
        try:
            for method, pattern, answer in ROUTES:
                if self.command in method and (match := re.fullmatch(pattern, self.where)):
                    answer(self, **match.groupdict())
                    return
            raise RefusalError(404, f"no route for {self.command} {self.where}")
        except RefusalError as refusal:
            length = int(self.headers.get("Content-Length") or 0)
            if length and not getattr(self, "was_read", False):
                self.rfile.read(length)
            headers = {"X-Error-Message": refusal.message}
            headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
            self.reply({"error": refusal.message}, refusal.status, headers)
        finally:
            self.was_read = False

    do_GET = do_POST = do_PUT = do_HEAD = handle_one  # noqa: N815  (the names that http.server calls)

    def reply(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        self.was_read = True
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def user(self) -> str | None:
        """Who asks; None without a token."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return user

    def may(self, name: str, write: bool = False) -> None:
        user, owner = self.user(), name.partition("/")[0]
        private = self.hub.repo(name)["private"]
        if user != owner and private:
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        if user != owner and write:
            raise RefusalError(403, f"you have no right to write to {name}")

    # What is asked of an account and of its repositories.

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise RefusalError(401, "Invalid username or password.")
        self.reply({"type": "user", "name": user, "auth": {"type": "access_token"}})

    def create(self) -> None:
        asked, user = json.loads(self.body()), self.user()
        owner = asked.get("organization") or user
        if user is None or owner != user:
            raise RefusalError(403, f"you cannot create a repository for {owner}")
        name = f"{owner}/{asked['name']}"
        with self.hub.lock:
            if (self.hub.root / "repos" / f"{name}.json").exists():
                raise RefusalError(409, "You already created this model repo")
            repo = {"private": asked.get("visibility") == "private", "commits": []}
            self.hub.commit(repo, "initial commit", {".gitattributes": self.hub.file(_ATTRIBUTES)})
            self.hub.save(name, repo)
        self.reply({"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self) -> None:
        """As the hub does: metadata is a mapping, and a base is one of its ids."""
        content = json.loads(self.body())["content"]
        facts = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
        base = facts.get("base_model", "a/b")
        errors = [] if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else [f'"base_model" {base!r} is not valid']
        body = {"errors": [{"message": error} for error in errors], "warnings": []}
        self.reply(body, 400 if errors else 200)

    def info(self, name: str, revision: str | None = None) -> None:
        self.may(name)
        repo, commit = self.hub.repo(name), self.hub.at(name, revision or "main")
        siblings = [{"rfilename": path} for path in commit["files"]]
        self.reply({"id": name, "sha": commit["oid"], "private": repo["private"], "siblings": siblings})

    def tree(self, name: str, revision: str, under: str = "") -> None:
        self.may(name)
        files = self.hub.at(name, revision)["files"]
        self.reply([_listed(path, entry) for path, entry in files.items() if path.startswith(under)])

    # What goes into a repository.

    def preupload(self, name: str, revision: str) -> None:
        self.may(name, write=True)
        there, answers = self.hub.at(name, revision)["files"], []
        for file in json.loads(self.body())["files"]:
            path, had = file["path"], there.get(file["path"])
            large = file["size"] > _LFS_BYTES or any(fnmatch(path, pattern) for pattern in _LFS)
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            oid = {"oid": had["sha256"] if had["lfs"] else had["oid"]} if had else {}
            answers.append(answer | oid)
        self.reply({"files": answers})

    def batch(self, name: str) -> None:
        self.may(name, write=True)
        objects = []
        for asked in json.loads(self.body())["objects"]:
            digest = asked["oid"]
            answer = {"oid": digest, "size": asked["size"]}
            if not self.hub.object(digest).exists():
                href = self.hub.signed(digest)
                verify = f"{self.hub.url}/{name}.git/info/lfs/objects/verify"
                answer |= {"actions": {"upload": {"href": href}, "verify": {"href": verify}}}
            objects.append(answer)
        self.reply({"transfer": "basic", "objects": objects})

    def verify(self, name: str) -> None:
        self.may(name, write=True)
        asked = json.loads(self.body())
        path = self.hub.object(asked["oid"])
        if not path.exists() or path.stat().st_size != asked["size"]:
            raise RefusalError(404, "no such object")
        self.reply({})

    def put(self, digest: str) -> None:
        """A storage, not the hub: it knows no token, and a signature for one object alone."""
        if self.query.get("X-Amz-Signature") != [self.hub.sign(digest)]:
            raise RefusalError(403, "SignatureDoesNotMatch")
        if self.headers.get("Authorization"):
            raise RefusalError(400, "a token was sent to the storage")
        with self.hub.lock:
            self.hub.began += 1
            waits = self.hub.hold_after is not None and self.hub.began > self.hub.hold_after
        if waits:
            self.hub.held.set()
            self.hub.hold.wait()
            raise RefusalError(500, "the upload was cut")
        content = self.body()
        if hashlib.sha256(content).hexdigest() != digest:
            raise RefusalError(400, "BadDigest")
        with self.hub.lock:
            self.hub.store(content)
            self.hub.received.append(digest)
        self.reply({})

    def commit(self, name: str, revision: str) -> None:
        self.may(name, write=True)
        lines = [json.loads(line) for line in self.body().splitlines()]
        with self.hub.lock:
            repo = self.hub.repo(name)
            files = dict(self.hub.at(name, revision)["files"])
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = self.hub.file(base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self._large(value)
                else:
                    del files[value["path"]]
            oid = self.hub.commit(repo, lines[0]["value"]["summary"], files)
            self.hub.save(name, repo)
        self.reply({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def _large(self, value: dict[str, Any]) -> dict[str, Any]:
        path = self.hub.object(value["oid"])
        if not path.exists():
            raise RefusalError(400, f"{value['path']}: its object was not uploaded")
        size = path.stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {size}\n"
        return {**self.hub.file(pointer.encode()), "sha256": value["oid"], "size": size, "lfs": True}

    # What comes out of it.

    def resolve(self, name: str, revision: str, path: str) -> None:
        self.may(name)
        commit = self.hub.at(name, revision)
        if path not in commit["files"]:
            raise RefusalError(404, "Entry not found", "EntryNotFound")
        entry = commit["files"][path]
        headers = {"X-Repo-Commit": commit["oid"]}
        if not entry["lfs"]:
            self.reply(
                self.hub.object(entry["sha256"]).read_bytes(), headers=headers | {"ETag": f'"{entry["oid"]}"'}
            )
            return
        digest = entry["sha256"]
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(entry["size"])}
        headers["Location"] = self.hub.signed(digest)
        self.reply(b"", 302, headers)

    def get(self, digest: str) -> None:
        if self.query.get("X-Amz-Signature") != [self.hub.sign(digest)]:
            raise RefusalError(403, "SignatureDoesNotMatch")
        self.reply(self.hub.object(digest).read_bytes(), headers={"ETag": f'"{digest}"'})


def _listed(path: str, entry: dict[str, Any]) -> dict[str, Any]:
    listed = {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"]}
    lfs = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 130}
    return listed | ({"lfs": lfs} if entry["lfs"] else {})


_NAME, _REVISION = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[\w.-]+)"
_OBJECT = r"/lfs/(?P<digest>[0-9a-f]{64})"
ROUTES = [
    (("GET",), r"/api/whoami-v2", Handler.whoami),
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), r"/api/validate-yaml", Handler.validate),
    (("GET",), rf"/api/models/{_NAME}", Handler.info),
    (("GET",), rf"/api/models/{_NAME}/revision/{_REVISION}", Handler.info),
    (("GET",), rf"/api/models/{_NAME}/tree/{_REVISION}/?", Handler.tree),
    (("GET",), rf"/api/datasets/{_NAME}", Handler.info),
    (("GET",), rf"/api/datasets/{_NAME}/revision/{_REVISION}", Handler.info),
    (("GET",), rf"/api/datasets/{_NAME}/tree/{_REVISION}/?(?P<under>.*)", Handler.tree),
    (("POST",), rf"/api/models/{_NAME}/preupload/{_REVISION}", Handler.preupload),
    (("POST",), rf"/api/models/{_NAME}/commit/{_REVISION}", Handler.commit),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/verify", Handler.verify),
    (("PUT",), _OBJECT, Handler.put),
    (("GET", "HEAD"), _OBJECT, Handler.get),
    (("GET", "HEAD"), rf"(?:/datasets)?/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", Handler.resolve),
]


@contextmanager
def running(root: Path, tokens: dict[str, str]) -> Iterator[Hub]:
    """A hub with its repositories in `root` for those who have one of the tokens, {token: user}."""
    hub = Hub(root, tokens)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.hold.set()
        server.shutdown()
        server.server_close()
