"""The hub's client, and what its errors mean: one line for a person, with the next thing to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from engines.errors import EngineError
from gemma_tui import VERSION
from gemma_tui.errors import GemmaTuiError
from gemma_tui.text import one_line, without_tokens

if TYPE_CHECKING:
    from huggingface_hub import HfApi

AWAITS, NOT_ASKED = "is awaiting a review", "not in the authorized list"
"""Of the hub's own words for a gated model: a request was made, or none."""


AGENT: dict[str, Any] = {"library_name": "gemma-tui", "library_version": VERSION}
"""What the hub is told of who asks."""


class AccessError(GemmaTuiError):
    """The hub does not let this user have a repository."""


def client() -> HfApi:
    """The hub's client; endpoint and token are the library's own."""
    from huggingface_hub import HfApi

    return HfApi(**AGENT)


def endpoint() -> str:
    """The address of the hub."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


@contextmanager
def explained(what: str, revision: str = "", gated: str = "") -> Iterator[None]:
    """The client's errors as lines for a person.

    Raises:
        AccessError: the repository is not there, or not for this user.
        GemmaTuiError: anything else that the client raises.
        EngineError: what is refused here, as it is.
    """
    try:
        yield
    except EngineError:
        raise
    except Exception as error:  # of a client that is one of two libraries, by its version
        raise reason(error, what, revision, gated) from error


def reason(error: Exception, what: str, revision: str = "", gated: str = "") -> GemmaTuiError:
    """What an error of the client means, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return GemmaTuiError(
            f"HF_HUB_OFFLINE is set, so the hub is not asked for {what}: unset it, or use what is here"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return AccessError(f"{what} has no revision {revision!r}: name a branch, a tag or a commit that it has")
    if isinstance(error, errors.GatedRepoError | errors.RepositoryNotFoundError) or _status(error) in (401, 403):
        return AccessError(_refused(error, what, gated))
    if _status(error) == 429:
        return GemmaTuiError(f"the hub asks to wait (429) for {what}: try again in some minutes")
    if status := _status(error):
        return GemmaTuiError(f"the hub answers {status} for {what}: {_said(error) or 'try again later'}")
    if getattr(error, "errno", None) is not None and isinstance(error, OSError):
        return GemmaTuiError(f"{what}: {error.strerror}: check the disk and the cache's folder")
    shown = one_line(without_tokens(str(error)), 160) or type(error).__name__
    return GemmaTuiError(f"{what} could not be had from {endpoint()} ({shown}): check the network")


def _refused(error: Exception, repo: str, gated: str) -> str:
    """The sentence that helps: no token, a bad one, terms to accept, or approval to wait for."""
    from huggingface_hub import errors, get_token

    place = f"{endpoint()}/{repo}"
    if not get_token():
        if isinstance(error, errors.GatedRepoError):
            return f"{repo} is gated: log in with `hf auth login` or set HF_TOKEN, and accept its terms at {place}"
        return f"{repo} is not on the hub, or private: check the name, or log in with `hf auth login` or HF_TOKEN"
    if not _token_is_valid():  # a stale token breaks public repositories, too
        return f"the hub rejects your token for {repo}: `hf auth login` with a new one; HF_TOKEN, if set, comes first"
    if not isinstance(error, errors.GatedRepoError):
        if isinstance(error, errors.RepositoryNotFoundError):
            return f"{repo} is not on the hub, or not yours to see: check the name"
        return f"the hub refuses {repo}: {_said(error) or 'your token may not read it'}"
    said = _said(error)
    if AWAITS in said:
        return f"{repo} is gated, and your request awaits its owners' approval: try again once {place} says granted"
    if said and NOT_ASKED not in said:  # a token without the right to gated models, or a request that was rejected
        return f"{repo} is gated: {said} ({place})"
    owners = ", and wait for its owners' approval" if gated == "manual" else ""
    return f"{repo} is gated: accept its terms at {place} with the account of your token{owners}, then try again"


def _token_is_valid() -> bool:
    from huggingface_hub import errors

    try:
        client().whoami(cache=True)
    except errors.HfHubHTTPError as error:
        return _status(error) != 401
    except Exception:  # the hub has gone meanwhile; the refusal itself is told
        return True
    return True


def _status(error: Exception) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _said(error: Exception) -> str:
    """The server's own words, cleaned."""
    said = getattr(error, "response", None)
    return one_line(without_tokens(str(said.headers.get("X-Error-Message") or "")), 120) if said is not None else ""
