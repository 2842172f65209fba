"""Serves the page on which people label: a Starlette application over a session.

Only a browser that knows the token in the address may use it, from a page of this program. `Guard`
refuses other hosts' names (so that no name of another site can be made to point here), requests
from other pages, and addresses without the token. Images are known by identifiers, never by a name
that a request gives; what requests say is limited in size and looked at before it is used.
"""

import hmac
import ipaddress
import json
import pathlib
import re
import socket
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamical_jax.errors import UserError, describe
from dynamical_jax.labeling import export, label_studio, previews, tables
from dynamical_jax.labeling.session import NewAnswer, Offer, Session

PAGE = pathlib.Path(__file__).parent / "page"
STATIC = {
    "": ("index.html", "text/html"),
    "page.css": ("page.css", "text/css"),
    "page.js": ("page.js", "text/javascript"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
LARGEST_BODY = 2**16
"""Largest size of a request in bytes; a grid of answers has some thousand."""

MOST_OFFERS, LARGEST_GRID = 12, 100

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Headers of each response: nothing is loaded from other hosts, no other page frames this one."""


def create(
    session: Session, token: str, images: pathlib.Path, table: pathlib.Path, host: str = "127.0.0.1"
) -> "Guard":
    """Returns the application.

    Args:
      session: is entered.
      token: the first part of each address.
      images: the folder of images.
      table: of labels; folders of sorted images are made beside it.
      host: what the server is bound to.
    """
    pictures = previews.Previews()
    page = _Page(session, pictures, images, table)
    routes = [Route(f"/{name}", page.static(name)) for name in STATIC]
    routes += [
        Route("/status", page.status),
        Route("/progress", page.progress),
        Route("/image/{size}/{identifier}", page.image),
        Route("/labels.csv", page.labels),
        Route("/predictions.csv", page.predictions),
        Route("/label-studio.json", page.label_studio),
    ]
    routes += [
        Route(f"/{name}", _json_endpoint(handle), methods=["POST"])
        for name, handle in (
            ("next", page.next),
            ("answer", page.answer),
            ("undo", page.undo),
            ("class", page.add_class),
            ("grid", page.grid),
            ("review", page.review),
            ("sort", page.sort),
        )
    ]
    app = Starlette(routes=routes, exception_handlers={UserError: _explain, OSError: _explain})
    return Guard(app, token, _names(host))


class Guard:
    """Passes on requests from a page of this program, as the module's docstring defines them.

    Args:
      app: what is guarded; it sees paths without the token.
      token: the first part of each path.
      names: by which this machine may be called; `ANY_ADDRESS` stands for all IP addresses.
    """

    def __init__(self, app: ASGIApp, token: str, names: Iterable[str]):
        self._app, self._token, self._names = app, token, frozenset(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in message["headers"]}
                message["headers"] += [
                    (name.encode(), value.encode())
                    for name, value in {"cache-control": "no-store", **HEADERS}.items()
                    if name.encode() not in names
                ]
            await send(message)

        request = Request(scope)
        refusal = self._refusal(request)
        if refusal is not None:
            await refusal(scope, receive, send_with_headers)
            return
        path = scope["path"].removeprefix(f"/{self._token}")
        await self._app({**scope, "path": path}, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if not self._is_ours(host):
            return PlainTextResponse("this is not the host that was asked for", 421)
        path = request.scope["path"]
        token = path.removeprefix("/").partition("/")[0]
        if not hmac.compare_digest(token.encode(errors="replace"), self._token.encode()):
            return PlainTextResponse("there is nothing here: is the address complete?", 404)
        if request.method not in ("GET", "HEAD"):
            origin = urllib.parse.urlsplit(request.headers.get("origin", ""))
            if origin.scheme not in ("http", "https") or origin.netloc != host:
                return PlainTextResponse("only the page itself may do this", 403)
        if path == f"/{self._token}":
            return RedirectResponse(f"/{self._token}/")
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._names:
            return True
        return ANY_ADDRESS in self._names and _is_address(name)


ANY_ADDRESS = "*"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach what is bound to a host."""
    return host in LOOPBACK or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _names(host: str) -> set[str]:
    """Returns the host names by which the server may be called, also through a tunnel."""
    names = {*LOOPBACK, host}
    if not is_loopback(host):
        # A site that wants to reach it by a name of its own has no address for a name.
        names |= {ANY_ADDRESS, socket.gethostname().lower(), socket.getfqdn().lower()}
    return names


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class _Json(JSONResponse):
    """A response in ASCII, since file names may hold bytes that are not text."""

    def render(self, content: Any) -> bytes:
        """Returns JSON."""
        return json.dumps(content, allow_nan=False).encode()


class _Page:
    """The handlers of the page's requests."""

    def __init__(
        self,
        session: Session,
        pictures: previews.Previews,
        images: pathlib.Path,
        table: pathlib.Path,
    ):
        self._session, self._pictures = session, pictures
        self._images, self._table = images, table

    def static(self, name: str) -> Callable[[Request], Response]:
        """Returns a handler that sends a file of the page."""
        file, kind = STATIC[name]
        content = (PAGE / file).read_bytes()
        return lambda request: Response(content, media_type=kind)

    def status(self, request: Request) -> Response:
        return _Json({"status": self._status()})

    def progress(self, request: Request) -> Response:
        return _Json(self._session.progress() | {"status": self._status()})

    def image(self, request: Request) -> Response:
        size = request.path_params["size"]
        if size not in previews.SIDES:
            raise HTTPException(404)
        try:
            path = self._session.path(request.path_params["identifier"])
        except UserError as error:
            raise HTTPException(404) from error
        try:
            content, kind = self._pictures.get(path, size)
        except Exception:  # Pillow's decoders are many.
            return PlainTextResponse("this file cannot be read", 415)
        headers = {"cache-control": "private, max-age=3600"}
        return Response(content, media_type=kind, headers=headers)

    def labels(self, request: Request) -> Response:
        try:
            content = self._table.read_bytes()
        except FileNotFoundError:
            content = b"path,label\n"
        return _download(content, "labels.csv", "text/csv")

    def predictions(self, request: Request) -> Response:
        text = tables.proposal_text(self._session.predictions(), self._table)
        return _download(text.encode(), "predictions.csv", "text/csv")

    def label_studio(self, request: Request) -> Response:
        labels, rest = self._session.labels, self._session.predictions()
        text = label_studio.tasks(self._images, labels, rest)
        return _download(text.encode(), "label-studio.json", "application/json")

    def next(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._offers(body)

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        given = body.get("given")
        if not isinstance(given, list) or not 1 <= len(given) <= LARGEST_GRID:
            raise UserError("there is no answer")
        if not all(isinstance(one, dict) for one in given):
            raise UserError("there is no answer")
        conflicts = self._session.answer(
            _client(body),
            [NewAnswer(_text(one, "id"), _text(one, "what"), _text(one, "label")) for one in given],
            _text(body, "who"),
        )
        return self._offers(body) | {"conflicts": [conflict._asdict() for conflict in conflicts]}

    def undo(self, body: dict[str, Any]) -> dict[str, Any]:
        undone = self._session.undo(_client(body), _text(body, "who"))
        return self._offers(body) | {"undone": list(map(_offer_fields, undone))}

    def add_class(self, body: dict[str, Any]) -> dict[str, Any]:
        name = body.get("name")
        if not isinstance(name, str):
            raise UserError("a class needs a name")
        if body.get("sure") is not True and (known := self._session.look_alike(name)):
            return {"alike": known, "status": self._status()}
        return {"name": self._session.add_class(name), "status": self._status()}

    def grid(self, body: dict[str, Any]) -> dict[str, Any]:
        offers = self._session.grid(_client(body), _text(body, "name"))
        self._pictures.prepare((self._session.path(offer.id) for offer in offers), "thumb")
        return {"grid": list(map(_offer_fields, offers)), "status": self._status()}

    def review(self, body: dict[str, Any]) -> dict[str, Any]:
        self._session.review()
        return {"status": self._status()}

    def sort(self, body: dict[str, Any]) -> dict[str, Any]:
        into = self._table.with_suffix(".sorted")
        copies = body.get("copies") is True
        count = export.sort(self._images, self._session.labels, into, copies)
        return {"folder": str(into), "count": count}

    def _offers(self, body: dict[str, Any]) -> dict[str, Any]:
        count = body.get("count", 1)
        if not isinstance(count, int) or not 1 <= count <= MOST_OFFERS:
            raise UserError(f"there are 1 to {MOST_OFFERS} pictures at a time")
        offers = self._session.offers(_client(body), count)
        paths = [self._session.path(offer.id) for offer in offers]
        self._pictures.prepare(paths[:3], "large")
        self._pictures.prepare(paths, "thumb")
        return {"offers": list(map(_offer_fields, offers)), "status": self._status()}

    def _status(self) -> dict[str, Any]:
        return self._session.status() | {"folder": self._images.resolve().name}


def _offer_fields(offer: Offer) -> dict[str, Any]:
    """Returns the fields of a picture for the page, without the reason for asking, a hint."""
    return {
        "id": offer.id,
        "name": offer.path,
        "predicted": offer.predicted,
        "confidence": offer.confidence,
        "label": offer.label,
    }


def _json_endpoint(handle: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Request], Any]:
    """Returns an endpoint that calls `handle` with the JSON of a request, in a thread."""

    async def endpoint(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise HTTPException(415, "JSON is expected")
        parts, size = [], 0
        declared = request.headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > LARGEST_BODY:
            raise HTTPException(413)
        async for part in request.stream():
            size += len(part)
            if size > LARGEST_BODY:
                raise HTTPException(413)
            parts.append(part)
        try:
            body = json.loads(b"".join(parts))
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, "this is no JSON") from error
        if not isinstance(body, dict):
            raise HTTPException(400, "an object is expected")
        return _Json(await run_in_threadpool(handle, body))

    return endpoint


def _explain(request: Request, error: Exception) -> Response:
    text = describe(error) if isinstance(error, OSError) else str(error)
    return _Json({"error": text[:500]}, 400)


def _client(body: dict[str, Any]) -> str:
    client = body.get("client")
    if not isinstance(client, str) or not re.fullmatch(r"[A-Za-z0-9-]{1,40}", client):
        raise UserError("a client has a short name of letters and digits")
    return client


def _text(body: dict[str, Any], name: str, longest: int = 200) -> str:
    text = body.get(name, "")
    if not isinstance(text, str) or len(text) > longest or (text and not text.isprintable()):
        raise UserError(f"{name} must be a line of at most {longest} characters")
    return text


def _download(content: bytes, name: str, kind: str) -> Response:
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type=kind, headers=headers)
