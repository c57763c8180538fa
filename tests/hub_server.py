"""A small Hub on 127.0.0.1, for huggingface_hub's own client: repositories, commits, LFS, downloads, and failures.

It keeps everything in memory. `Hub.failures` says which requests go wrong; `Hub.requests` what was asked.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants, hf_api

WRITER, READER = "hf_writer_secret", "hf_reader_secret"  # tokens; the first one's namespace is `me`
DROP, SILENT = 0, -1
LFS = (".safetensors", ".png")


@dataclass
class Failure:
    """What happens to the next `times` requests of this method with `part` in their path.

    They get `status`; or DROP: the connection is closed in the middle; or SILENT: nothing is ever said.
    """

    method: str
    part: str
    status: int
    times: int = 1_000_000


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # all files, by commit
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Hub:
    address: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)  # models by name, datasets as "datasets/" and the name
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS, by SHA-256
    failures: list[Failure] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def add_model(self, repo_id: str, files: dict[str, bytes]) -> None:
        self.repos[repo_id] = Repo()
        self.repos[repo_id].commit("main", files, "initial commit")


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str = "", **more: str):
        self.status, self.message, self.code, self.more = status, message, code, more


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args) -> None:
        pass

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for failure in self.hub.failures:
            if failure.times and failure.method == self.command and failure.part in path:
                failure.times -= 1
                if failure.status in (DROP, SILENT):
                    self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                    self.close_connection = failure.status == DROP or self.hub.closing.wait()
                    return
                self.body()
                return self.send_json({"error": "injected"}, failure.status)
        try:
            if "/resolve/" in path:
                self.resolve(*path[1:].split("/resolve/"))
            else:
                self.send_json(self.route(path[1:].split("/"), self.body()))
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self.send_json({"error": error.message} | error.more, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send_json(self, content: object, status: int = 200, headers: dict | None = None) -> None:
        self.send_bytes(json.dumps(content).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def send_bytes(self, content: bytes, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ------------------------------------------------------------------ what is asked

    def repo(self, repo_id: str) -> Repo:
        if repo_id not in self.hub.repos:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.hub.repos[repo_id]

    def check_writer(self) -> None:
        match self.headers.get("Authorization", "").removeprefix("Bearer "):
            case "hf_writer_secret":
                return
            case "hf_reader_secret":
                raise HubError(403, "You don't have the rights to write")
        raise HubError(401, "Invalid credentials in Authorization header")

    def route(self, parts: list[str], body: bytes) -> object:
        match self.command, parts:
            case "GET", ["api", "whoami-v2"]:
                return {"name": "me", "orgs": []}
            case "POST", ["api", "validate-yaml"]:
                return self.validate(json.loads(body)["content"])
            case "POST", ["api", "repos", "create"]:
                return self.create(json.loads(body))
            case "GET", ["api", "datasets", name]:
                return self.info(f"datasets/{name}", "main")
            case _, ["api", "datasets", namespace, name, *rest]:
                return self.model(f"datasets/{namespace}/{name}", rest, body)
            case _, ["api", "models", namespace, name, *rest]:
                return self.model(f"{namespace}/{name}", rest, body)
            case "POST", [namespace, name, "info", "lfs", "objects", "batch"]:
                return self.lfs_batch(f"{namespace}/{name}".removesuffix(".git"), json.loads(body))
            case "PUT", ["lfs", oid]:
                assert hashlib.sha256(body).hexdigest() == oid
                self.hub.objects[oid] = body
                return {}
            case "POST", ["lfs-verify"]:
                if (asked := json.loads(body))["size"] != len(self.hub.objects.get(asked["oid"], b"")):
                    raise HubError(404, "no such object")
                return {}
        raise HubError(404, f"{self.command} {self.path} is not known here")

    def validate(self, content: str) -> dict:
        metadata = yaml.safe_load(content.split("---\n")[1])
        if not isinstance(metadata.get("license", "mit"), str) or " " in metadata.get("license", "mit"):
            raise HubError(400, "license must be one of the identifiers")
        return {"errors": [], "warnings": []}

    def create(self, asked: dict) -> dict:
        self.check_writer()
        namespace = asked["organization"] or "me"
        if namespace != "me":
            raise HubError(403, f"You don't have the rights to create a model under the namespace {namespace}")
        repo_id = f"{namespace}/{asked['name']}"
        if repo_id in self.hub.repos:
            raise HubError(409, "You already created this model repo", url=f"{self.hub.address}/{repo_id}")
        self.hub.add_model(repo_id, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.hub.repos[repo_id].private = asked.get("visibility") == "private"
        return {"url": f"{self.hub.address}/{repo_id}"}

    def model(self, repo_id: str, rest: list[str], body: bytes) -> object:
        repo = self.repo(repo_id)
        match self.command, rest:
            case "GET", []:
                return self.info(repo_id, "main")
            case "GET", ["revision", *revision]:
                return self.info(repo_id, "/".join(revision))
            case "GET", ["auth-check", "write"]:
                self.check_writer()
                return {}
            case "GET", ["refs"]:
                refs = [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
                    for name, sha in repo.branches.items()
                ]
                return {"branches": refs, "converts": [], "tags": []}
            case "GET", ["tree", revision, *folder]:
                above = "".join(f"{part}/" for part in folder)
                found = [
                    {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
                    for path, content in self.at(repo, revision).items()
                    if path.startswith(above)
                ]
                if folder and not found:
                    raise HubError(404, "no such folder", "EntryNotFound")
                return found
            case "POST", ["branch", *name]:
                self.check_writer()
                if "/".join(name) in repo.branches:
                    raise HubError(409, "Reference already exists")
                repo.branches["/".join(name)] = repo.branches["main"]
                return {}
            case "POST", ["preupload", *revision]:
                self.check_writer()
                files = self.at(repo, "/".join(revision))
                return {"files": [_upload_mode(asked, files) for asked in json.loads(body)["files"]]}
            case "POST", ["commit", *revision]:
                self.check_writer()
                return self.commit(repo_id, "/".join(revision), [json.loads(line) for line in body.splitlines()])
        raise HubError(404, f"{self.command} {self.path} is not known here")

    def at(self, repo: Repo, revision: str) -> dict[str, bytes]:
        try:
            return repo.files(revision)
        except KeyError:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None

    def info(self, repo_id: str, revision: str) -> dict:
        repo = self.repo(repo_id)
        siblings = [{"rfilename": path} for path in self.at(repo, revision)]
        sha = repo.branches.get(revision, revision)
        return {"_id": "0", "id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}

    def lfs_batch(self, repo_id: str, asked: dict) -> dict:
        self.check_writer()
        self.repo(repo_id)
        objects = []
        for item in asked["objects"]:
            if item["oid"] not in self.hub.objects:
                verify = {"href": f"{self.hub.address}/lfs-verify"}
                item |= {"actions": {"upload": {"href": f"{self.hub.address}/lfs/{item['oid']}"}, "verify": verify}}
            objects.append(item)
        return {"transfer": "basic", "objects": objects}

    def commit(self, repo_id: str, revision: str, lines: list[dict]) -> dict:
        repo = self.repo(repo_id)
        files, message = dict(self.at(repo, revision)), ""
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        sha = repo.commit(revision, files, message)
        return {"commitUrl": f"{self.hub.address}/{repo_id}/commit/{sha}", "commitOid": sha}

    def resolve(self, repo_id: str, rest: str) -> None:
        repo = self.repo(repo_id)
        if repo.private and "Authorization" not in self.headers:
            raise HubError(401, "Repository not found", "RepoNotFound")
        revision, _, path = rest.partition("/")
        files = self.at(repo, revision)
        headers = {"X-Repo-Commit": repo.branches.get(revision, revision)}
        if path not in files:
            error = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.send_json({"error": "Entry not found"}, 404, headers | error)
        content, status = files[path], 200
        headers |= {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if path.endswith(LFS):
            headers |= {"X-Linked-Size": len(content), "X-Linked-ETag": headers["ETag"]}
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            end = min(int(last or len(content)) + 1, len(content))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            content, status = content[int(first) : end], 206
        self.send_bytes(content, status, headers)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _upload_mode(asked: dict, files: dict[str, bytes]) -> dict:
    path = asked["path"]
    lfs = path.endswith(LFS)
    found = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
    if path in files:
        found["oid"] = hashlib.sha256(files[path]).hexdigest() if lfs else _git_oid(files[path])
    return found


@contextmanager
def client_of(address: str, folder: Path) -> Iterator[None]:
    """This process as a client of the Hub at an address until the block ends, with a cache in the folder, no login."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "".join(template[1:]))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        # private: what lists the cache has a copy of the constant.
        patch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(folder / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        patch.delenv("HF_TOKEN", raising=False)
        # private: clients that were made before keep asking the real Hub, six times over 24 seconds.
        patch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        patch.setattr(hf_api.api, "endpoint", address)
        yield


@contextmanager
def hub_of_this_process(folder: Path) -> Iterator[Hub]:
    """A Hub, and this process as a client of it."""
    with running_hub() as hub, client_of(hub.address, folder):
        yield hub


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that answers at `hub.address` until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
