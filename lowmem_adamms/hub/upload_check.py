"""Whether a repository on the Hub can take a merge: asked before anything is written.

All that is said to the Hub goes through huggingface_hub, so HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE mean what they mean everywhere. Leaves to others: making the repository and filling
it (`push.py`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..checkpoints.mapped_files import file_digest
from ..errors import PushError, first_line
from ..merging.journal import ANSWERS

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.hf_api import RepoFile

AT_ONCE = (1.0, 3.0)
"""Seconds between the attempts of a check; nobody has waited for anything yet."""
NOT_PUSHED = (ANSWERS, "report.html")
"""They hold the prompts and images of a search, which may not be meant for the public."""
_ITS_OWN = ".gitattributes"  # the Hub puts it into every new repository
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Target:
    """A repository that can take an upload.

    head: the commit of its main branch, None if it does not exist. here: files of ours that it
    holds already, byte for byte. stale: its other files, to be deleted or overwritten.
    """

    repo: str
    private: bool = False
    replace: bool = False
    head: str | None = None
    here: frozenset[str] = field(default_factory=frozenset)
    stale: frozenset[str] = field(default_factory=frozenset)


def check(
    repo: str,
    *,
    private: bool = False,
    replace: bool = False,
    card: str | None = None,
    out: Path | None = None,
) -> Target:
    """The repository, if `repo` names one that this token may create or fill; else PushError.

    private: make it so; a public one is refused. replace: also one that holds other files. card:
    the model card that will go there, whose metadata the Hub must accept. out: the folder to be
    pushed where it is complete, so that what the Hub has of it counts as ours.
    """
    from huggingface_hub import constants

    _check_name(repo)
    if constants.HF_HUB_OFFLINE:
        raise PushError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    hub = api()
    _check_token(hub, repo)
    if card is not None:
        check_card(card)
    found = _existing(hub, repo, private=private)
    if found is None:
        return Target(repo, private, replace)
    there = listing(hub, repo) if found[1] - {_ITS_OWN} else {}
    ours = pushed_files(out) if out else {}
    here = frozenset(name for name, file in there.items() if is_same(file, ours.get(name)))
    others = frozenset(there) - here - {_ITS_OWN}
    if others and not replace:
        raise PushError(
            f"{repo} exists on the Hub and holds other files ({sorted(others)[0]} and so on);"
            " choose another name, or replace them with --replace-repo"
        )
    return Target(repo, private, replace, found[0], here, others)


def api() -> HfApi:
    """The Hub's client, under our name."""
    from huggingface_hub import HfApi

    from ..version import __version__

    return HfApi(library_name="lowmem-adamms", library_version=__version__)


def pushed_files(out: Path) -> dict[str, Path]:
    """What of a merged folder belongs into its repository, by the path it has there."""
    found = {}
    for path in sorted(out.rglob("*")):
        relative = path.relative_to(out)
        odd = any(part.startswith((".", "__pycache__")) for part in relative.parts)
        if path.is_file() and not odd and str(relative) not in NOT_PUSHED:
            found[relative.as_posix()] = path
    return found


def listing(hub: HfApi, repo: str) -> dict[str, RepoFile]:
    """Every file on the repository's main branch."""
    from huggingface_hub.hf_api import RepoFile

    tree = patiently(lambda: list(hub.list_repo_tree(repo, recursive=True)))
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def is_same(there: RepoFile, here: Path | None) -> bool:
    """Whether a file on the Hub has the bytes of one here: sha256 if it is large, else git's."""
    if here is None or there.size != here.stat().st_size:
        return False
    digest = hashlib.sha256() if there.lfs else hashlib.sha1(b"blob %d\0" % there.size)
    return file_digest(here, digest) == (there.lfs.sha256 if there.lfs else there.blob_id)


def patiently(
    call: Callable[[], _T],
    waits: Sequence[float] | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> _T:
    """What `call` returns; tried again after each wait (AT_ONCE) if what went wrong may pass.

    huggingface_hub raises many kinds of errors, also of modules below it, and on answers that make
    no sense whatever these lead to: whatever it raises becomes a PushError.
    """
    for wait in (*(AT_ONCE if waits is None else waits), None):
        try:
            return call()
        except Exception as error:
            cause = _cause(error)
            if wait is None or not _may_pass(cause):
                raise PushError(_words(cause)) from error
        sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def status(error: BaseException | None) -> int | None:
    """The HTTP status that an error came with, if any; of a PushError, that of its cause."""
    while isinstance(error, (PushError, RuntimeError)) and error.__cause__:
        error = error.__cause__
    return getattr(getattr(error, "response", None), "status_code", None)


def _cause(error: BaseException) -> BaseException:
    """huggingface_hub wraps what went wrong with a large file in a RuntimeError."""
    while isinstance(error, RuntimeError) and error.__cause__:
        error = error.__cause__
    return error


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt may go better: not if the Hub said no, or a file here is missing."""
    if (code := status(error)) is not None:
        return code >= 500 or code in (408, 429)
    return not (isinstance(error, OSError) and error.filename)


def _words(error: BaseException) -> str:
    said = getattr(error, "server_message", None)
    code = status(error)
    if code is not None and said:
        return f"the Hub says: {' '.join(str(said).split())} ({code})"
    if type(error).__name__.endswith("Timeout"):  # of httpx, or of what huggingface_hub asks with
        return f"uploading failed: the Hub took or sent nothing for too long ({first_line(error)})"
    line = first_line(error)
    return f"the Hub says: {line}" if code else f"uploading failed: {type(error).__name__}: {line}"


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PushError(f"{repo!r} is no name for a repository: {first_line(error)}") from None
    if repo.count("/") != 1:
        raise PushError(f"{repo!r}: expected a repository as org/name or user/name")


def _check_token(hub: HfApi, repo: str) -> None:
    """A token that the Hub knows, and whose owner may write into the repository's namespace."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise PushError("no token for the Hub; set HF_TOKEN or run `hf auth login`")
    try:
        me = patiently(hub.whoami)
    except PushError as error:
        if status(error) == 401:
            raise PushError(
                "the Hub does not know this token; set another HF_TOKEN or run `hf auth login`"
            ) from error
        raise
    namespace = repo.partition("/")[0]
    orgs = {org.get("name"): org for org in me.get("orgs", ())}
    name = me.get("name")
    if namespace != name and namespace not in orgs:
        known = ", ".join(str(known) for known in (name, *orgs))
        raise PushError(f"{repo}: this token is {name}'s and can write to {known}, not {namespace}")
    if orgs.get(namespace, {}).get("roleInOrg") == "read":
        raise PushError(f"{repo}: {name} may only read in {namespace}; ask for the role `write`")
    if not _token_writes(me, namespace, repo):
        raise PushError(f"{repo}: this token may not write there; use one with the role `write`")


def _token_writes(me: Mapping[str, Any], namespace: str, repo: str) -> bool:
    """What the Hub tells of a token's own role; where it tells nothing, the Hub will decide."""
    token = me.get("auth", {}).get("accessToken", {})
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") != "fineGrained" or not isinstance(scopes, list):
        return bool(token.get("role") != "read")
    return any(
        scope.get("entity", {}).get("name") in (namespace, repo)
        and any(may.startswith("repo") and may.endswith("write") for may in scope["permissions"])
        for scope in scopes
    )


def check_card(card: str) -> None:
    """PushError if the Hub would refuse the card: then the commit at the very end would fail."""
    from huggingface_hub import ModelCard

    advice = "; rename the inputs' folders or mend the base's README.md"
    try:
        parsed = ModelCard(card)
    except Exception as error:  # YAML's own errors, and what the library makes of odd values
        line = first_line(error)
        raise PushError(f"the model card's metadata are not valid: {line}{advice}") from error
    if verdict := patiently(lambda: _verdict(parsed)):
        raise PushError(f"the Hub refuses the model card: {verdict}{advice}")


def _verdict(card: ModelCard) -> str | None:
    """What the Hub has against a card, if anything."""
    try:
        card.validate()
    except ValueError as error:
        if status(error.__context__) != 400:
            raise
        try:
            said = [str(item["message"]) for item in json.loads(str(error))["errors"]]
        except (ValueError, KeyError, TypeError):
            said = []
        return "; ".join(said) or first_line(error)
    return None


def _existing(hub: HfApi, repo: str, *, private: bool) -> tuple[str | None, set[str]] | None:
    """Head and files of the repository if it exists and this token may write to it."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = patiently(lambda: hub.model_info(repo))
    except PushError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            return None
        raise
    if private and not info.private:
        raise PushError(
            f"{repo} exists on the Hub and is public; make it private in its settings, or leave out"
            " --private"
        )
    try:
        patiently(lambda: hub.auth_check(repo, write=True))
    except PushError as error:
        if not isinstance(error.__cause__, TypeError):  # huggingface_hub before 2: no `write`
            raise PushError(f"{repo}: this token may not write there ({error})") from error
    return info.sha, {sibling.rfilename for sibling in info.siblings or ()}
