"""A Hub on loopback: the routes that `huggingface_hub` calls to push and to load models."""

import asyncio
import base64
import hashlib
import json
import threading
from pathlib import Path
from urllib.parse import unquote

import yaml
from aiohttp import web
from hub.faults import Fault, Faults, Seen
from hub.store import Blob, Commit, Repository, Store

OWNER = "hf_" + "Owner" * 7  # may write to me/...
STRANGER = "hf_" + "Other" * 7  # may write to you/...
USERS = {OWNER: "me", STRANGER: "you"}
LARGE = 50_000  # bytes above which a file is stored by its sha256


class Hub:
    """`with Hub(folder) as hub:` serves at `hub.url`. `hub.store` has what was pushed, `hub.log` the
    requests, and `hub.fail(route, ...)` lets the next one of a route fail.

    only_regular: every file travels in the commit, as it does for a client with Xet whose files are
    all small.
    """

    def __init__(self, root: Path, *, only_regular: bool = False):
        self.store = Store(root)
        self.only_regular = only_regular
        self.faults = Faults()
        self.url = ""

    def __enter__(self) -> "Hub":
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def log(self) -> list[Seen]:
        return self.faults.log

    def requests(self, route: str) -> list[Seen]:
        return [seen for seen in self.log if seen.route == route]

    def fail(self, route: str, **fault) -> None:
        """See `Fault`. Routes are called as the methods below."""
        self.faults.waiting.setdefault(route, []).append(Fault(**fault))

    def forgive(self) -> None:
        """No fault waits any longer, and the log begins anew."""
        self.faults.waiting.clear()
        self.log.clear()

    async def _start(self) -> None:
        app = web.Application(middlewares=[self.faults.middleware()], client_max_size=2**30)
        model, files = "/api/models/{ns}/{name}", "/{ns}/{name}/resolve/{rev}/{path:.+}"
        for method, path, handler in [
            ("GET", "/api/whoami-v2", self.whoami),
            ("POST", "/api/repos/create", self.create),
            ("POST", "/api/validate-yaml", self.validate),
            ("GET", model, self.info),
            ("GET", model + "/revision/{rev}", self.info),
            ("GET", model + "/tree/{rev}", self.tree),
            ("POST", model + "/paths-info/{rev}", self.paths),
            ("POST", model + "/branch/{rev}", self.branch),
            ("POST", model + "/preupload/{rev}", self.preupload),
            ("POST", model + "/commit/{rev}", self.commit),
            ("POST", "/{ns}/{name}.git/info/lfs/objects/batch", self.batch),
            ("PUT", "/large/{oid}", self.upload),
            ("POST", "/large/{oid}/verify", self.verify),
            ("GET", files, self.resolve),
        ]:
            app.router.add_route(method, path, handler)
        app.router.add_route("HEAD", files, self.resolve)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def whoami(self, request: web.Request) -> web.Response:
        user = _user(request)
        if user is None:
            return _refuse(401, "Invalid username or password.")
        return web.json_response({"name": user, "type": "user", "orgs": [], "auth": {}})

    async def create(self, request: web.Request) -> web.Response:
        asked, user = await request.json(), _user(request)
        if user is None:
            return _refuse(401, "Invalid username or password.")
        owner = asked.get("organization") or user
        if owner != user:
            return _refuse(403, f"You don't have the rights to create a model under {owner}.")
        name = f"{owner}/{asked['name']}"
        url = {"url": f"{self.url}/{name}"}
        if name in self.store.repositories:
            return web.json_response(url | {"error": "You already created this repo"}, status=409)
        self.store.create(name, private=asked.get("visibility") == "private")
        return web.json_response(url)

    async def validate(self, request: web.Request) -> web.Response:
        text = (await request.json())["content"]
        try:
            data = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
            errors = [] if isinstance(data, dict) else ["metadata should be a mapping"]
        except yaml.YAMLError as error:
            errors = [str(error)]
        found = {"errors": [{"message": message} for message in errors], "warnings": []}
        return web.json_response(found, status=400 if errors else 200)

    async def info(self, request: web.Request) -> web.Response:
        repository, commit = self._readable(request)
        return web.json_response(
            {
                "id": repository.name,
                "sha": commit.oid,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "tags": [],
                "siblings": [{"rfilename": path} for path in commit.files],
            }
        )

    async def tree(self, request: web.Request) -> web.Response:
        _, commit = self._readable(request)
        return web.json_response([_entry(path, blob) for path, blob in commit.files.items()])

    async def paths(self, request: web.Request) -> web.Response:
        _, commit = self._readable(request)
        asked = (await request.post()).getall("paths")
        found = [_entry(path, commit.files[path]) for path in asked if path in commit.files]
        return web.json_response(found)

    async def branch(self, request: web.Request) -> web.Response:
        repository = self._writable(request)
        name, asked = _revision(request), await request.json()
        if name in repository.heads:
            return _refuse(409, f"Reference already exists: refs/heads/{name}")
        repository.heads[name] = repository.at(asked.get("startingPoint") or "main").oid
        return web.json_response({}, status=201)

    async def preupload(self, request: web.Request) -> web.Response:
        repository = self._writable(request)
        commit = self._at(repository, _revision(request))
        answers = []
        for file in (await request.json())["files"]:
            large = not self.only_regular and file["size"] > LARGE
            answer = {"path": file["path"], "shouldIgnore": False}
            answer["uploadMode"] = "lfs" if large else "regular"
            if file["path"] in commit.files:
                answer["oid"] = commit.files[file["path"]].oid
            answers.append(answer)
        return web.json_response({"files": answers})

    async def batch(self, request: web.Request) -> web.Response:
        # Large files for a pull request come without the branch that they are for.
        body = await request.json()
        self._writable(request, proposed="ref" not in body)
        answers = []
        for asked in body["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if self.store.large(asked["oid"]) is None:
                href = f"{self.url}/large/{asked['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            answers.append(answer)
        return web.json_response({"transfer": "basic", "objects": answers})

    async def upload(self, request: web.Request) -> web.Response:
        """A file is there when all of it has come and is what was announced, or not at all."""
        oid, digest = request.match_info["oid"], hashlib.sha256()
        part = self.store.path(f"{oid}.part")
        with part.open("wb") as file:
            async for chunk in request.content.iter_chunked(2**16):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != oid:
            part.unlink()
            return _refuse(400, "the content is not what was announced")
        part.rename(self.store.path(oid))
        return web.Response()

    async def verify(self, request: web.Request) -> web.Response:
        asked, found = await request.json(), self.store.large(request.match_info["oid"])
        if found is None or found.size != asked["size"]:
            return _refuse(400, "not the size that was announced")
        return web.json_response({})

    async def commit(self, request: web.Request) -> web.Response:
        repository = self._writable(request)
        head = _revision(request)
        parent = self._at(repository, head)
        lines = [json.loads(line) for line in (await request.read()).splitlines()]
        header, files = lines[0]["value"], dict(parent.files)
        if header.get("parentCommit") not in (None, parent.oid):
            return _refuse(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = self.store.add(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                blob = self.store.large(value["oid"])
                if blob is None:
                    return _refuse(400, f"LFS pointer pointed to a file that does not exist: {value}")
                files[value["path"]] = blob
            elif files.pop(value["path"], None) is None:
                return _refuse(404, "A file with this name doesn't exist", "EntryNotFound")
        answer = {}
        if request.query.get("create_pr"):
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.heads)
            head = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.url}/{repository.name}/discussions/{number}"
        commit = repository.commit(head, header["summary"], files)
        url = f"{self.url}/{repository.name}/commit/{commit.oid}"
        return web.json_response(answer | {"commitUrl": url, "commitOid": commit.oid})

    async def resolve(self, request: web.Request) -> web.StreamResponse:
        repository, commit = self._readable(request, content=True)
        known = {"X-Repo-Commit": commit.oid}
        blob = commit.files.get(request.match_info["path"])
        if blob is None:
            return _refuse(404, "Entry not found", "EntryNotFound", known)
        known |= {"ETag": f'"{blob.oid}"'}
        if request.method == "HEAD":
            return web.Response(headers=known | {"Content-Length": str(blob.size)})
        return web.FileResponse(self.store.path(blob.oid), headers=known)

    def _readable(self, request: web.Request, *, content: bool = False) -> tuple[Repository, Commit]:
        """Raises as the Hub answers: a private repository does not exist for others, and the files of a
        gated one are for whom its owner lets in."""
        repository, user = self._repository(request), _user(request)
        owner = repository.name.split("/")[0] == user
        if repository.private and not owner:
            raise _Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if content and repository.gated and not owner and user not in repository.readers:
            raise _Refused(403, f"Access to model {repository.name} is restricted", "GatedRepo")
        return repository, self._at(repository, _revision(request))

    def _writable(self, request: web.Request, *, proposed: bool = False) -> Repository:
        repository, user = self._repository(request), _user(request)
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        # Anyone may open a pull request to what is public.
        proposed = (proposed or "create_pr" in request.query) and not repository.private
        if repository.name.split("/")[0] != user and not proposed:
            raise _Refused(403, f"Forbidden: you must use a write token to upload to {repository.name}")
        return repository

    def _repository(self, request: web.Request) -> Repository:
        name = "{ns}/{name}".format(**request.match_info)
        if name not in self.store.repositories:
            raise _Refused(404 if _user(request) else 401, "Repository not found", "RepoNotFound")
        return self.store.repositories[name]

    def _at(self, repository: Repository, revision: str) -> Commit:
        commit = repository.at(revision)
        if commit is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


class _Refused(web.HTTPException):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status_code = status
        super().__init__(headers=_headers(message, code), text=json.dumps({"error": message}))


def _headers(message: str, code: str | None) -> dict[str, str]:
    return {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


def _refuse(
    status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
) -> web.Response:
    headers = _headers(message, code) | (headers or {})
    return web.json_response({"error": message}, status=status, headers=headers)


def _user(request: web.Request) -> str | None:
    return USERS.get(request.headers.get("Authorization", "").removeprefix("Bearer "))


def _revision(request: web.Request) -> str:
    return unquote(request.match_info.get("rev", "main"))


def _entry(path: str, blob: Blob) -> dict:
    entry = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.oid, "size": blob.size, "pointerSize": 128}
    return entry
