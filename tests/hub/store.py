"""What a Hub keeps: repositories with commits, branches and pull requests, and their blobs on disk."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Blob:
    """Content of a file: the sha256 of a large one, as git names a small one."""

    oid: str
    size: int
    lfs: bool


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repository:
    """`heads` are branches and pull requests by name; `readers` may read it where it is gated."""

    name: str
    private: bool
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.heads.get(revision, revision))

    def commit(self, head: str, title: str, files: dict[str, Blob]) -> Commit:
        history = f"{self.heads.get(head)} {len(self.commits)} {title} {sorted(files)}"
        commit = Commit(hashlib.sha1(history.encode()).hexdigest(), title, files)
        self.commits[commit.oid] = commit
        self.heads[head] = commit.oid
        return commit


class Store:
    def __init__(self, root: Path):
        self.root = root
        self.repositories: dict[str, Repository] = {}
        root.mkdir(parents=True, exist_ok=True)

    def create(self, name: str, private: bool) -> Repository:
        repository = self.repositories[name] = Repository(name, private)
        attributes = self.add(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        repository.commit("main", "initial commit", {".gitattributes": attributes})
        return repository

    def path(self, oid: str) -> Path:
        return self.root / oid

    def add(self, content: bytes) -> Blob:
        """A small file."""
        oid = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        self.path(oid).write_bytes(content)
        return Blob(oid, len(content), lfs=False)

    def large(self, oid: str) -> Blob | None:
        """A large file, where it was uploaded."""
        path = self.path(oid)
        return Blob(oid, path.stat().st_size, lfs=True) if path.is_file() else None

    def read(self, name: str, path: str, revision: str = "main") -> bytes:
        return self.path(self.repositories[name].at(revision).files[path].oid).read_bytes()

    def files(self, name: str, revision: str = "main") -> set[str]:
        return set(self.repositories[name].at(revision).files) - {".gitattributes"}
