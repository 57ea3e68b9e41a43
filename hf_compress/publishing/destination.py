"""Where on a Hub a model goes, and what can be known about that before anything is sent."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from huggingface_hub import HfApi, ModelInfo, get_token, is_offline_mode
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

_TOKEN = re.compile(r"\bhf_(?:[a-z]+_)?[A-Za-z0-9]{20,}[\w.-]*")
_SIGNATURE = re.compile(r"(https?://[^\s?]+)\?\S+")


def without_tokens(text: str) -> str:
    """`text` with "[token]" in place of what looks like a token of the Hub."""
    return _TOKEN.sub("[token]", text)


class PushError(RuntimeError):
    """A push that did not end as it should. Says what happened, what is on the Hub now, and the call
    that goes on."""


@dataclass(frozen=True)
class Destination:
    """A repository of models on the Hub that `HF_ENDPOINT` names.

    repo_id: "org/name", or "name" for one of the user's own.
    private: whether it is to be private, where it has to be created. A public one is refused where
        True; None leaves that to the Hub.
    revision: branch to commit to, made from "main" where it is missing, or the "refs/pr/N" of an open
        pull request; None: "main".
    create_pr: open a pull request instead, on "main" of a repository that is there.
    token: of a user who may write; by default the one that is logged in. It appears in no log and no
        error.

    Raises ValueError for a `repo_id` that is none, and for `create_pr` with a `revision`.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        validate_repo_id(self.repo_id)
        if self.create_pr and self.revision not in (None, "main"):
            raise ValueError(
                f"`revision` is {self.revision!r} with create_pr=True, and a pull request goes to "
                "'main': leave one of them out."
            )

    @property
    def api(self) -> HfApi:
        return HfApi(token=self.token)

    def checked(self) -> Destination:
        """The same with the name of the user in `repo_id`, after a look at the Hub.

        Raises PushError for what would fail later: a Hub that is not there or does not know the token,
        a public repository that should be private, none for a pull request.
        """
        if is_offline_mode():
            raise PushError(
                f"{self.repo_id} cannot be pushed with HF_HUB_OFFLINE=1: unset it, or write a folder "
                "only, with push=False."
            )
        try:
            user = self.api.whoami()["name"]
            whole = self if "/" in self.repo_id else replace(self, repo_id=f"{user}/{self.repo_id}")
            info = whole.info()
        except Exception as error:
            # The cause may hold the token in its text.
            raise PushError(f"Nothing was sent: {self.reason(error)}") from None
        if info is None and self.create_pr:
            raise PushError(
                f"{whole.repo_id} is not there, or not for this user, so it takes no pull request: "
                "leave out create_pr=True to make it."
            )
        if info is not None and self.private and not info.private:
            raise PushError(
                f"{whole.repo_id} is there and public: make it private in its settings, take another "
                "name, or leave out private=True."
            )
        return whole

    def info(self) -> ModelInfo | None:
        """What the Hub knows about the repository; None where it is not there."""
        try:
            return self.api.model_info(self.repo_id)
        except RepositoryNotFoundError:
            return None

    def head(self) -> str | None:
        """The commit that `revision` stands at."""
        return self.api.model_info(self.repo_id, revision=self.revision).sha

    def secret(self) -> str | None:
        """The token that goes with the requests."""
        return self.token or get_token()

    def reason(self, error: BaseException) -> str:
        """Type and text of `error` and of what caused it, without tokens and signed links."""
        told: list[str] = []
        cause: BaseException | None = error
        while cause is not None:
            text = " ".join(str(cause).split())
            if not any(text in other for other in told):
                told.append(f"{type(cause).__name__}: {text}")
            cause = cause.__cause__
        line = _SIGNATURE.sub(r"\1", "; ".join(told))
        if secret := self.secret():
            line = line.replace(secret, "[token]")
        return without_tokens(line)

    def call(self, folder: object) -> str:
        """The Python that pushes `folder` here."""
        words = [repr(str(folder)), repr(self.repo_id)]
        words += [f"private={self.private}"] if self.private is not None else []
        words += [f"revision={self.revision!r}"] if self.revision is not None else []
        words += ["create_pr=True"] if self.create_pr else []
        return f"push_folder({', '.join(words)})"
