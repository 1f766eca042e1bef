"""``docs/reference/http-api.md``, made from the routes and the schemas themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from fastapi.routing import APIRoute
    from pydantic import BaseModel

HEADER = """\
# HTTP API

What each route takes and answers. This page is made by `scripts/reference` from the schemas that check the requests;
the same is at `/openapi.json` and `/docs` of a running server.

## Common rules

- **Key.** `Authorization: Bearer KEY` or `X-API-Key: KEY` on every route but `/`, `/health`, `/ready` and `/ping`.
- **Body.** JSON, at most `SERVE_MAX_BODY_BYTES`. Types are taken literally: `"5"` is no number.
- **Fields.** *Required* and *supported* fields do what they say; an inner field is required where the object that
  holds it is sent. *Ignored* ones are ignored by design: they change nothing that a single model on its own server
  could do otherwise. *Refused* ones are known and not implemented: anything but the values named is 400
  `unsupported_parameter`. Null is the same as leaving a field out, except where it is required. A field
  that no table names, outermost or inner, is accepted and listed in the header `x-ignored-parameters` unless it is
  null; with `SERVE_STRICT=true` it is 400.
- **Images, sound, files** in messages are 400 with the name of the part. `SERVE_IMAGE_INPUT=note` makes an image a
  text that the model cannot see it, and lists the part in `x-ignored-parameters`.
- **Errors.** `{"error": {"message", "type", "param", "code"}}`; `message` names field, value and remedy. 429 and 503
  carry `Retry-After`.
- **Streams.** `stream: true` answers `text/event-stream`: one JSON object an event, then `data: [DONE]`. Comments
  (`: keep-alive`) come every `SERVE_KEEP_ALIVE_S` seconds until the first token. Everything that can be known is
  checked before the headers; a later error is an event with the error object, and ends the stream.
- **Request id.** `x-request-id` of the request is kept when it is sane, else made; it is in the answer and the log.
"""

EXTRAS = """
## Fields of compatible servers

On every route that generates text and does not name them above, refused unless they ask for nothing, since they would
change the answer:

| field | accepted values |
|---|---|
"""

OTHERS = """
## Fields of other routes

One route's field on another one that generates text and does not name it above (`max_tokens` on `/v1/responses`) is
refused just so; the message says what the field is called there:

| field | accepted values |
|---|---|
"""

REALTIME = """
## WebSocket /v1/realtime/chat

Chat completions, one after the other, on one connection. All messages are JSON in text frames of at most
`SERVE_MAX_BODY_BYTES`.

| from | message | means |
|---|---|---|
| client | the body of `POST /v1/chat/completions` | Begin a turn. `stream` may be left out. |
| client | `{"type": "cancel"}` | End the running turn. |
| client | `{"type": "ping"}` | Ask for a sign of life; also while a turn is running. |
| server | a `chat.completion.chunk` | As in a stream, one a message. |
| server | `{"type": "done"}` | The turn is complete. |
| server | `{"type": "cancelled"}` | The turn was ended as asked. |
| server | `{"type": "pong"}` | The answer to a ping. |
| server | `{"type": "error", "error": {...}, "status": 400, "ends_turn": true}` | What HTTP would have answered. |

An error leaves the connection open. One turn runs at a time; a request during a turn is an error that leaves the turn
alone. Closing the connection ends the generation before the next step. The server closes with 1012 when it shuts down
(a running turn is finished first), 1003 on bytes, 1009 on a message that is too large.

The key comes in the headers of the handshake. A browser cannot set them, so there it is a subprotocol beside the
protocol's own, in base64url without padding; never put a key into the address:

```js
const key = btoa("sk-...").replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "")
const socket = new WebSocket("wss://HOST/v1/realtime/chat", ["trimaran.chat.v1", "trimaran.key." + key])
```

Without keys, pages of other origins are refused.
"""


def http_api() -> str:
    """The whole page."""
    from serve.api.app import create_app  # noqa: PLC0415
    from serve.api.errors import all_routes  # noqa: PLC0415
    from serve.api.schemas.sampling import OTHER_ROUTES, REFUSED_EXTRAS  # noqa: PLC0415
    from serve.settings import Settings  # noqa: PLC0415

    known: dict[str, Any] = {"engine": "echo", "_env_file": None}
    app = create_app(Settings(**known))
    found = [route for route in all_routes(app.routes) if route.include_in_schema]
    sections = "".join(map(_section, found))
    return HEADER + sections + EXTRAS + _extras(REFUSED_EXTRAS) + OTHERS + _extras(OTHER_ROUTES) + REALTIME


def _extras(table: Mapping[str, tuple[Any, ...]]) -> str:
    return "".join(f"| `{name}` | {_values(values)} |\n" for name, values in sorted(table.items()))


def _section(route: APIRoute) -> str:
    method = min(route.methods or {"GET"})
    text = f"\n## {method} {route.path}\n\n{route.summary}. {_plain(route.description)}\n"
    body: Any = cast("Any", route.body_field).field_info.annotation if route.body_field is not None else None
    if hasattr(body, "model_json_schema"):  # a plain object goes on to a route with a schema
        text += "\n| field | type | status | |\n|---|---|---|---|\n" + "\n".join(_request_rows(body)) + "\n"
    if route.dependant.query_params:
        rows = [
            f"| `{query.name}` | {_plain(query.field_info.description)} |" for query in route.dependant.query_params
        ]
        text += "\n| in the query | |\n|---|---|\n" + "\n".join(rows) + "\n"
    model: Any = route.response_model
    if hasattr(model, "model_json_schema"):
        rows = [f"| `{field.path}` | {_types(field)} |" for field in _fields(model.model_json_schema())]
        text += "\nThe answer:\n\n| field | type |\n|---|---|\n" + "\n".join(rows) + "\n"
    statuses = [str(status) for status in route.responses if str(status) != "200"]
    return text + (f"\nStatuses: 200, {', '.join(statuses)}.\n" if statuses else "")


def _request_rows(body: type[BaseModel]) -> Iterator[str]:
    ignored: frozenset[str] = getattr(body, "IGNORED", frozenset())
    neutral: Mapping[str, tuple[Any, ...]] = getattr(body, "NEUTRAL", {})
    for found in _fields(body.model_json_schema()):
        notes = " ".join(dict.fromkeys(filter(None, (_plain(form.get("description")) for form in found.forms))))
        status = "required" if found.is_required else "supported"
        for word in ("ignored", "refused"):
            if notes.startswith(word.capitalize()):
                notes = notes[len(word) :].lstrip(":. ").capitalize()
                status = word
        if found.top in ignored:
            status = "ignored"
        elif found.top in neutral:
            status = "refused"
            notes += f" Accepted: {_values(neutral[found.top])}." if found.path == found.top else ""
        yield f"| `{found.path}` | {_types(found)} | {status} | {notes.strip()} |"


def _plain(text: Any) -> str:
    return " ".join(str(text or "").replace("``", "`").split())


def _values(values: tuple[Any, ...]) -> str:
    return ", ".join(f"`{json.dumps(value)}`" for value in (None, *values))


@dataclass
class _Field:
    """A field, and what it may hold in each member of a union that has it; ``top`` is the outermost field's name."""

    path: str
    top: str
    is_required: bool
    forms: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])


def _fields(schema: Mapping[str, Any]) -> list[_Field]:
    """Every field, those of inner objects too."""
    definitions: Mapping[str, Any] = schema.get("$defs", {})
    found: dict[str, _Field] = {}

    def walk(holder: Mapping[str, Any], place: str, top: str, seen: tuple[str, ...]) -> None:
        for name, form in holder.get("properties", {}).items():
            path = f"{place}.{name}" if place else name
            is_required = name in holder.get("required", ())
            known = found.setdefault(path, _Field(path, top or path, is_required))
            known.is_required = known.is_required and is_required
            known.forms.append(form)
            for inner, suffix in _objects(form):
                if inner not in seen:
                    walk(definitions[inner], path + suffix, top or path, (*seen, inner))

    walk(schema, "", "", ())
    return list(found.values())


def _objects(form: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names of the objects in a field, and how their fields are reached."""
    if "$ref" in form:
        yield form["$ref"].rpartition("/")[2], ""
    if isinstance(form.get("items"), dict):
        yield from ((name, "[]" + suffix) for name, suffix in _objects(form["items"]))
    for member in (*form.get("anyOf", ()), *form.get("oneOf", ())):
        yield from _objects(member)


def _types(found: _Field) -> str:
    words = " or ".join(_type(form) for form in found.forms)
    return " or ".join(dict.fromkeys(words.split(" or ")))


def _type(form: Mapping[str, Any]) -> str:
    """In words: kind, range, length."""
    members = [member for member in (*form.get("anyOf", ()), *form.get("oneOf", ())) if member.get("type") != "null"]
    if members:
        return " or ".join(dict.fromkeys(_type(member) for member in members))
    if "$ref" in form:
        return "object"
    if "enum" in form or "const" in form:
        return " or ".join(f"`{json.dumps(value)}`" for value in form.get("enum", [form.get("const")]))
    kind = str(form.get("type", "any"))
    if kind == "array":
        kind = f"list of {_type(cast('Mapping[str, Any]', form.get('items', {})))}"
    low = form.get("minimum", form.get("exclusiveMinimum"))
    limits = [f"{'>' if 'exclusiveMinimum' in form else '≥'} {low}"] if low is not None else []
    if form.get("maximum") is not None:
        limits.append(f"≤ {form['maximum']}")
    if form.get("maxItems") is not None:
        limits.append(f"at most {form['maxItems']}")
    return kind + (f" ({', '.join(limits)})" if limits else "")
