"""The Hugging Face hub as the rest of the package asks it: at once where there is no network, errors in one line."""

from __future__ import annotations

import contextlib
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator


class NotReached(FileNotFoundError):
    """Something that is not in the cache, and no hub to ask for it. A command adds what it can do then."""

    not_reached = True


class Missing(FileNotFoundError):
    """A file that a repository does not have."""


def reachable() -> bool:
    """Whether the hub may be asked: not offline, and its name has an address, or a proxy may know it.

    huggingface_hub tries for minutes where there is none.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def explained(called: str, name: str, here: str = "a folder here", revision: str | None = None) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line.

    Args:
        called: the repository, as the line names it.
        name: the file that is asked for.
        here: what else could have been meant.
        revision: that is asked for.

    Raises:
        NotReached, Missing: see there.
        FileNotFoundError: no such repository or revision, or a gated one.
        ValueError: everything else that the hub or the connection to it answers.
    """
    from huggingface_hub import errors

    try:
        yield
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise NotReached(
            f"{called} is neither {here} nor in the Hugging Face cache, and the hub was not reached; "
            "check the name, the network and HF_HUB_OFFLINE"
        ) from None
    except errors.EntryNotFoundError:
        raise Missing(f"{called} on the Hugging Face hub has no {name}") from None
    except errors.GatedRepoError:
        raise FileNotFoundError(f"{called} is gated: ask for access on the hub, then run: hf auth login") from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{called} is neither {here} nor a repository on the Hugging Face hub; for a private one: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{called} on the Hugging Face hub has no revision {revision!r}") from None
    except Exception as error:
        client = type(error).__module__.startswith("http")  # httpx, under whichever name the hub's client has it
        if not client and not isinstance(error, (errors.HfHubHTTPError, errors.HFValidationError)):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{called} could not be read from the Hugging Face hub: {reason}") from None
