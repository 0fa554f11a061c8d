"""A small Hub on loopback: the part of its HTTP API that huggingface_hub uses to publish and to load models.

Users are known by their tokens (`hf_alice` is alice). A repository is a list of commits; a commit maps paths to
contents; large files arrive by LFS, as on the Hub. `server.log` holds every request and every operation of a commit,
`server.cut` breaks connections.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub.utils.sha import git_hash

LARGE = re.compile(r".*\.(safetensors|bin|pth)$")


@dataclass
class Repository:
    owner: str
    private: bool = False
    kind: str = "model"
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        content = json.dumps([message, len(self.commits), {path: git_hash(data) for path, data in files.items()}])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def resolve(self, revision: str) -> str | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return oid if oid in self.commits else None


class HubServer(ThreadingHTTPServer):
    """Serve it with `with HubServer() as server:`; its address is `server.url`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.log: list[str] = []
        self.cut: list[str] = []  # a request that begins so loses its connection, once each
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def add(self, repo_id: str, **fields: object) -> Repository:
        repository = self.repositories[repo_id] = Repository(owner=repo_id.split("/")[0], **fields)
        repository.commit(
            "main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial"
        )
        return repository

    def publish(self, repo_id: str, files: dict[str, bytes]) -> str:
        """Makes these the files of a repository on main, and returns the commit."""
        repository = self.repositories.get(repo_id) or self.add(repo_id)
        return repository.commit("main", files, "upload")

    def sent(self) -> list[str]:
        """Files that arrived since the last call: `lfs` their contents by LFS, else the operations of commits."""
        with self.lock:
            found = [line for line in self.log if line.startswith(("file ", "lfsFile ", "deletedFile ", "PUT "))]
            self.log.clear()
        return ["lfs" if line.startswith("PUT ") else line for line in found]

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that go away


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    # --- Plumbing

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        line = f"{self.command} {unquote(url.path)}"
        with self.server.lock:
            self.server.log.append(line)
            cut = next((start for start in self.server.cut if line.startswith(start)), None)
        length = int(self.headers.get("Content-Length") or 0)
        if cut is not None:
            self.server.cut.remove(cut)
            self.rfile.read(length // 2)
            self.connection.close()
            self.close_connection = True
            return
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(length)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user = token.removeprefix("hf_") or None
        self.query = parse_qs(url.query)
        try:
            if token and not token.startswith("hf_"):
                raise Refused(401, "", "Invalid credentials in Authorization header")
            with self.server.lock:
                self.route(unquote(url.path))
        except Refused as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            self.answer({"error": error.message}, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self) -> dict:
        return json.loads(self.body)

    # --- Routes

    def route(self, path: str) -> None:
        for pattern, function in ROUTES:
            if match := re.fullmatch(f"{pattern}", f"{self.command} {path}"):
                return function(self, *match.groups())
        raise Refused(404, "", f"no such endpoint: {self.command} {path}")

    def repository(self, repo_id: str, kind: str = "model", write: bool = False) -> Repository:
        repository = self.server.repositories.get(repo_id)
        if repository is None or repository.kind != kind:
            raise Refused(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if repository.private and self.user != repository.owner:
            raise Refused(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and self.user != repository.owner:
            raise Refused(403, "", f"You don't have the required permissions to write to {repo_id}")
        return repository

    def revision(self, repository: Repository, revision: str) -> str:
        oid = repository.resolve(revision)
        if oid is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    def create(self) -> None:
        wanted = self.json()
        owner, name = wanted.get("organization") or self.user, wanted["name"]
        if owner != self.user:
            raise Refused(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id = f"{owner}/{name}"
        kind = wanted.get("type") or "model"
        url = f"{self.server.url}/{'spaces/' if kind == 'space' else ''}{repo_id}"
        if repo_id in self.server.repositories:
            return self.answer({"error": "You already created this repo", "url": url}, 409)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        if kind == "space" and wanted.get("sdk") not in ("gradio", "static"):
            raise Refused(400, "", "A Space needs an sdk")
        self.server.add(repo_id, private=private, kind=kind)
        self.answer({"url": url})

    def validate(self) -> None:
        content = self.json()["content"]
        valid = content.startswith("---\n") and "\nlicense: not-a-licence\n" not in content
        errors = [] if valid else [{"message": '"license" must be one of the known ones'}]
        self.answer({"errors": errors, "warnings": []}, 200 if valid else 400)

    def info(self, kind: str, repo_id: str, revision: str | None = None) -> None:
        repository = self.repository(repo_id, kind)
        oid = self.revision(repository, revision or "main")
        files = repository.commits[oid]
        config = json.loads(files.get("config.json", b"{}"))
        config = {key: config[key] for key in ("architectures", "model_type") if key in config}
        siblings = [{"rfilename": path} for path in sorted(files)]
        about = {"id": repo_id, "sha": oid, "private": repository.private, "config": config, "siblings": siblings}
        self.answer(about | {"tags": [], "downloads": 0})

    def refs(self, repo_id: str) -> None:
        repository = self.repository(repo_id)
        listed = {
            kind: [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": oid} for name, oid in names.items()]
            for kind, folder, names in (("branches", "heads", repository.branches), ("tags", "tags", repository.tags))
        }
        self.answer(listed | {"converts": []})

    def branch(self, repo_id: str, name: str) -> None:
        repository = self.repository(repo_id, write=True)
        if name in repository.branches:
            raise Refused(409, "", "Reference already exists")
        repository.branches[name] = repository.branches["main"]
        self.answer({})

    def tag(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id, write=True)
        if self.json()["tag"] in repository.tags:
            raise Refused(409, "", "Tag reference exists already")
        repository.tags[self.json()["tag"]] = self.revision(repository, revision)
        self.answer({})

    def tree(self, kind: str, repo_id: str, revision: str, folder: str = "") -> None:
        repository = self.repository(repo_id, kind)
        files = repository.commits[self.revision(repository, revision)]
        if folder and not any(path.startswith(folder + "/") for path in files):
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        self.answer([describe(path, data) for path, data in sorted(files.items()) if path.startswith(folder)])

    def paths_info(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id)
        files = repository.commits[self.revision(repository, revision)]
        paths = parse_qs(self.body.decode()).get("paths") or self.json()["paths"]
        self.answer([describe(path, files[path]) for path in paths if path in files])

    def file(self, repo_id: str, revision: str, path: str) -> None:
        repository = self.repository(repo_id)
        oid = self.revision(repository, revision)
        headers = {"X-Repo-Commit": oid}
        if path not in repository.commits[oid]:
            raise Refused(404, "EntryNotFound", f"{path} does not exist")
        data = repository.commits[oid][path]
        about = describe(path, data)
        headers |= {"ETag": f'"{about["lfs"]["oid"] if "lfs" in about else about["oid"]}"', "Accept-Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            self.answer(data[int(found[1]) : int(found[2]) + 1 if found[2] else None], 206, headers)
        else:
            self.answer(data, 200, headers)

    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id, kind, write="create_pr" not in self.query)
        present = repository.commits[self.revision(repository, revision)]
        answers = []
        for file in self.json()["files"]:
            path = file["path"]
            about = describe(path, present[path]) if path in present else {}
            mode = "lfs" if LARGE.match(path) else "regular"
            oid = about.get("lfs", {}).get("oid") or about.get("oid")
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": answers})

    def lfs_batch(self, kind: str | None, repo_id: str) -> None:
        self.repository(repo_id, kind or "model")
        objects = []
        for wanted in self.json()["objects"]:
            upload = {"href": f"{self.server.url}/lfs/{wanted['oid']}"}
            present = {} if wanted["oid"] in self.server.large else {"actions": {"upload": upload}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **present})
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "", "The content has another hash")
        self.server.large[oid] = self.body
        self.answer({})

    def commit(self, kind: str, repo_id: str, revision: str) -> None:
        create_pr = "create_pr" in self.query
        if self.user is None:
            raise Refused(401, "", "Log in")
        repository = self.repository(repo_id, kind, write=not create_pr)
        header, *lines = [json.loads(line) for line in self.body.splitlines()]
        parent = self.revision(repository, revision)
        if header["value"].get("parentCommit", parent) != parent:
            raise Refused(412, "", "A commit has happened since")
        files = dict(repository.commits[parent])
        for line in lines:
            kind, value = line["key"], line["value"]
            self.server.log.append(f"{kind} {value['path']}")
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        number = sum(name.startswith("refs/pr/") for name in repository.branches) + 1
        oid = repository.commit(f"refs/pr/{number}" if create_pr else revision, files, header["value"]["summary"])
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}"}
        if create_pr:
            answer |= {"pullRequestUrl": f"{self.server.url}/{repo_id}/discussions/{number}"}
        self.answer(answer)


def describe(path: str, data: bytes) -> dict:
    about = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
    if LARGE.match(path):
        sha256 = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        about["oid"] = git_hash(pointer)
        about["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": len(pointer)}
    return about


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"GET /api/(model|dataset|space)s/{REPO}", Handler.info),
    (rf"GET /api/(model|dataset|space)s/{REPO}/revision/(.+)", Handler.info),
    (rf"GET /api/models/{REPO}/refs", Handler.refs),
    (rf"POST /api/models/{REPO}/branch/(.+)", Handler.branch),
    (rf"POST /api/models/{REPO}/tag/(.+)", Handler.tag),
    (rf"GET /api/(model|space)s/{REPO}/tree/(refs/pr/\d+|[^/]+)", Handler.tree),
    (rf"GET /api/(model|space)s/{REPO}/tree/(refs/pr/\d+|[^/]+)/(.+)", Handler.tree),
    (rf"POST /api/models/{REPO}/paths-info/(.+)", Handler.paths_info),
    (rf"(?:GET|HEAD) /{REPO}/resolve/(refs/pr/\d+|[^/]+)/(.+)", Handler.file),
    (rf"POST /api/(model|space)s/{REPO}/preupload/(.+)", Handler.preupload),
    (rf"POST /(?:(space)s/)?{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /lfs/([0-9a-f]{64})", Handler.lfs_upload),
    (rf"POST /api/(model|space)s/{REPO}/commit/(.+)", Handler.commit),
]


class ModelScopeServer(ThreadingHTTPServer):
    """What the package modelscope asks its own hub for: the list of a repository's files, and files."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), ModelScopeHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories = repositories
        self.log: list[str] = []

    def __enter__(self) -> "ModelScopeServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self


class ModelScopeHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ModelScopeServer

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.server.log.append(f"{self.command} {unquote(self.path)}")
        match = re.fullmatch(r"/api/v1/models/([\w.-]+/[\w.-]+)/repo(/files)?", url.path)
        files = self.server.repositories.get(match[1], {}) if match else {}
        if match and match[2] and files:
            listed = [
                {"Path": path, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
                for path, data in files.items()
            ]
            self.answer(200, json.dumps({"Code": 200, "Success": True, "Data": {"Files": listed}}).encode())
        elif (path := parse_qs(url.query).get("FilePath", [""])[0]) in files:
            data = files[path]
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            part = data[int(found[1]) : int(found[2]) + 1 if found[2] else None] if found else data
            self.answer(206 if found else 200, part)
        else:
            self.answer(404, b'{"Code": 404, "Success": false, "Message": "not found"}')

    do_GET = do_HEAD = handle_request

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
