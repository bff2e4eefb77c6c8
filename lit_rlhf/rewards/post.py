"""One HTTP request with a JSON answer: where it may go, what it may carry, and what is said when it fails."""

from __future__ import annotations

import ipaddress
import os
from typing import Any
from urllib.parse import urlsplit

_MAY_PASS = {408, 425, 429, 500, 502, 503, 504}  # statuses that the next try may not meet


class HTTPError(Exception):
    """A request failed.

    Args:
        problem: what happened.
        passing: whether the failure may be gone at the next try.
    """

    def __init__(self, problem: str, passing: bool = False) -> None:
        super().__init__(problem)
        self.passing = passing


def check_address(url: str, allow_http: bool) -> None:
    """Refuse what is no address, holds a secret, or leaves this machine unencrypted.

    Raises:
        ValueError: says which of these. A secret is not repeated.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "HTTPReward: url holds a user, a query or a fragment, which would stand in logs and checkpoints: give the "
            "bare address, and a token by token_env"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"HTTPReward: url is {url!r}, expected https://host/path, or http:// on this machine")
    if parts.scheme == "http" and not allow_http and not is_here(url):
        raise ValueError(
            f"HTTPReward: {url} is plain http to another machine, where prompts, answers and the token can be read on "
            "the way: use https, or set allow_http if the network is your own"
        )


def is_here(url: str) -> bool:
    """Whether an address is this machine's own."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def post_json(url: str, body: Any, *, token_env: str | None, seconds: float) -> Any:
    """Send ``body`` as JSON and give the answer's JSON.

    Args:
        url: where to; a redirect is not followed.
        body: what to send.
        token_env: environment variable that holds a bearer token; no token is sent if null.
        seconds: limit of the connection and of each silence; who calls limits the whole.

    Raises:
        HTTPError: no connection, too slow, a status other than 200, no JSON, or no token to send.
    """
    import requests

    token = _token(token_env)
    silence = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    with requests.Session() as session:
        session.trust_env = not is_here(url)  # no proxy between this machine and itself
        try:
            reply = session.post(url, json=body, auth=_bearer(token), timeout=seconds, allow_redirects=False)
        except requests.RequestException as error:
            problem = _without(token, f"{type(error).__name__}: {error}")
            raise HTTPError(problem, passing=isinstance(error, silence)) from None
    said = _without(token, " ".join(reply.text[:400].split())[:200])
    if reply.status_code != 200:
        moved = "; redirects are not followed, give the address it leads to" if 300 <= reply.status_code < 400 else ""
        problem = f"status {reply.status_code}{moved}, expected 200. The answer begins {said!r}"
        raise HTTPError(problem, passing=reply.status_code in _MAY_PASS)
    try:
        return reply.json()
    except ValueError:
        raise HTTPError(f"the answer is no JSON; it begins {said!r}", passing=True) from None


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise HTTPError(f"the environment variable {variable}, which token_env names, is not set")
    if not (token.isascii() and token.isprintable()):
        raise HTTPError(f"the environment variable {variable} holds something that no token is made of")
    return token


def _bearer(token: str | None) -> Any:
    """What puts the token into a request; where there is none, what keeps a .netrc's password out of it."""

    def sign(request: Any) -> Any:
        if token is not None:
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    return sign


def _without(token: str | None, text: str) -> str:
    return text.replace(token, "***") if token else text
