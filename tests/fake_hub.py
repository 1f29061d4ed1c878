"""A Hugging Face hub on this machine: as much of its API as uploads and downloads of models call."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """Repositories in memory; `calls` are the requests, and `answers` errors to give: (method and path's end, code)."""

    def __init__(self):
        self.repos, self.blobs, self.calls, self.answers = {}, {}, [], []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, code, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self):
        hub, path = self.hub, self.path.partition("?")[0]
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.calls.append((self.command, path))
        for i, (wanted, code) in enumerate(hub.answers):
            if re.search(wanted, f"{self.command} {path}"):
                del hub.answers[i]
                return self.answer(code, {"error": "as asked"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        signed = path.startswith("/lfs")  # addresses that the batch gave, without a token
        if not signed and (self.headers.get("Authorization") or "") != "Bearer hf_right":
            return self.answer(401, {"error": "Invalid credentials"})
        for method, pattern, call in self.calls_of():
            if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                return call(data, *match.groups())
        return self.answer(404, {"error": f"no {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def calls_of(self):
        name = r"([\w.-]+/[\w.-]+)"
        return (
            ("POST", "/api/repos/create", self.create),
            ("GET", f"/api/models/{name}", self.info),
            ("GET", f"/api/models/{name}/revision/(.+)", self.info),
            ("GET", f"/api/models/{name}/tree/(.+)", self.tree),
            ("POST", f"/api/models/{name}/branch/(.+)", self.branch),
            ("POST", f"/api/models/{name}/preupload/(.+)", self.preupload),
            ("POST", rf"/{name}\.git/info/lfs/objects/batch", self.batch),
            ("PUT", "/lfs/([0-9a-f]+)", self.put),
            ("POST", "/lfs-verify", lambda data: self.answer(200, {})),
            ("POST", f"/api/models/{name}/commit/(.+)", self.commit),
            ("GET HEAD", f"/{name}/resolve/([^/]+)/(.+)", self.resolve),
        )

    def create(self, data):
        asked = json.loads(data)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if name in self.hub.repos:
            return self.answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repos[name] = {"private": private, "files": {"main": {}}, "messages": []}
        return self.answer(200, {"url": f"{self.hub.url}/{name}", "id": "1", "name": name})

    def info(self, data, name, revision="main"):
        if (repo := self.hub.repos.get(name)) is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        sha = hashlib.sha1(repr(repo["files"].get(revision)).encode()).hexdigest()
        siblings = [{"rfilename": f} for f in repo["files"].get(revision, {})]
        return self.answer(200, {"id": name, "sha": sha, "private": repo["private"], "siblings": siblings})

    def tree(self, data, name, revision):
        files = self.hub.repos[name]["files"].get(revision, self.hub.repos[name]["files"]["main"])
        found = [
            {"type": "file", "path": path, "size": len(blob), "oid": hashlib.sha1(blob).hexdigest()}
            for path, blob in files.items()
        ]
        return self.answer(200, found)

    def branch(self, data, name, branch):
        files = self.hub.repos[name]["files"]
        if branch in files:
            return self.answer(409, {"error": "Reference already exists"})
        files[branch] = dict(files["main"])
        return self.answer(200, {})

    def preupload(self, data, name, revision):
        said = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
             "shouldIgnore": False}
            for f in json.loads(data)["files"]
        ]  # fmt: skip
        return self.answer(200, {"files": said})

    def batch(self, data, name):
        objects = []
        for o in json.loads(data)["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}
            objects.append({**o, **({} if o["oid"] in self.hub.blobs else {"actions": action})})
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, data, oid):
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.blobs[oid] = data
        return self.answer(200)

    def commit(self, data, name, revision):
        repo = self.hub.repos[name]
        for line in map(json.loads, data.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo["messages"].append(value["summary"])
            elif line["key"] == "file":
                repo["files"][revision][value["path"]] = base64.b64decode(value["content"])
            else:
                repo["files"][revision][value["path"]] = self.hub.blobs[value["oid"]]
        sha = hashlib.sha1(data).hexdigest()
        url = f"{self.hub.url}/{name}/commit/{sha}"
        return self.answer(200, {"commitUrl": url, "commitOid": sha, "pullRequestUrl": None})

    def resolve(self, data, name, revision, path):
        files = self.hub.repos[name]["files"]
        blob = files.get(revision, files["main"]).get(path)
        if blob is None:
            return self.answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha256(blob).hexdigest()}"'
        return self.answer(200, blob, ETag=etag, X_Repo_Commit=hashlib.sha1(revision.encode()).hexdigest())
