"""What becomes of fields that this server does not know or does not implement."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from serve.api.errors import explain
from serve.api.schemas.sampling import OTHER_ROUTES, REFUSED_EXTRAS, SamplingFields
from serve.api.schemas.wire import RequestBody, UnreadPart, Wire
from serve.errors import InvalidRequest, UnsupportedParameter
from serve.setting_values import ImageInput
from serve.settings import Settings

W = TypeVar("W", bound=Wire)

MAX_NAMED = 20
"""Ignored fields that the header names."""

IMAGE_NOTE = "[An image was here. This model reads text only and cannot see it.]"
"""In the place of an image, under ``SERVE_IMAGE_INPUT=note``."""


def validated(kind: type[W], value: Any) -> W:
    """``value`` as a body that did not come through a route.

    Raises:
        InvalidRequest: it is none; names the field.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
        raise explain(problems, value) from None


def check_fields(body: RequestBody, settings: Settings) -> dict[str, str]:
    """Refuse by name what would have to change the answer and does not; return a header that names what is ignored.

    Args:
        body: The request; images in it become notes where the settings say so.
        settings: The container's: whether unknown fields are errors, and images.

    Raises:
        UnsupportedParameter: a known field that is not implemented asks for something.
        InvalidRequest: ``stream_options`` without ``stream``, or an unknown field and ``SERVE_STRICT``.
    """
    check_neutral(body)
    if isinstance(body, SamplingFields) and body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    return check_extras(body, settings)


def check_neutral(body: RequestBody) -> None:
    """The part of :func:`check_fields` that is about fields which are not implemented.

    Raises:
        UnsupportedParameter: one of them asks for something.
    """
    for name, neutral in body.NEUTRAL.items():
        _refuse(name, getattr(body, name), neutral, body)


def unread(kind: str, where: str) -> UnsupportedParameter:
    """The refusal of a part of a message that is no text."""
    return UnsupportedParameter(f"{where} is of type {kind}; this model reads text only, leave it out", param=where)


def _note_images(value: Any, place: str) -> Iterator[str]:
    """Put :data:`IMAGE_NOTE` in the place of every image, and tell their places."""
    if isinstance(value, Wire):
        for name, inner in value:
            yield from _note_images(inner, f"{place}.{name}" if place else name)
    elif isinstance(value, list):
        items = cast("list[Any]", value)
        for at, item in enumerate(items):
            here = f"{place}[{at}]"
            if isinstance(item, UnreadPart) and (text := item.replaced(IMAGE_NOTE)) is not None:
                items[at] = text
                yield here
            else:
                yield from _note_images(item, here)


def check_extras(body: Wire, settings: Settings) -> dict[str, str]:
    """The part of :func:`check_fields` that every route shares: images, and what no schema names."""
    noted = list(_note_images(body, "")) if settings.image_input is ImageInput.NOTE else []
    extras: Mapping[str, Any] = body.model_extra or {}
    refused = _refused_extras(body)
    for name in sorted(refused.keys() & extras.keys()):
        _refuse(name, extras[name], refused[name], body)
    unknown = _unknown(body, "", refused)
    if settings.strict:
        for name in unknown:
            raise InvalidRequest(f"{name} is no field of this request; leave it out", param=name)
    return _header([*noted, *islice(unknown, MAX_NAMED)])


_PLAIN = {str, bool, int, float, type(None)}
"""By far the most values, which are quickly told from objects of ours."""

_ALL_REFUSED = {**OTHER_ROUTES, **REFUSED_EXTRAS}


def _refused_extras(body: Wire) -> Mapping[str, tuple[Any, ...]]:
    return _ALL_REFUSED if isinstance(body, RequestBody) and body.GENERATES else REFUSED_EXTRAS


def _refuse(name: str, value: Any, neutral: tuple[Any, ...], body: Wire) -> None:
    asks_nothing = any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)
    if value is None or asks_nothing:
        return
    here = body.CALLED.get(name) if isinstance(body, RequestBody) else None
    advice = f"is no field of this route; send {here}" if here else "is not supported by this server; leave it out"
    raise UnsupportedParameter(f"{name} {advice}", param=name)


def _unknown(value: Wire, place: str, known: Container[str] = ()) -> Iterator[str]:
    """Paths of the fields that no schema names, null ones left out; ``known`` are those of the outermost object."""
    if isinstance(value, UnreadPart):  # refused as what it is, not for its fields
        return
    for name, inner in (value.model_extra or {}).items():
        if inner is not None and name not in known:
            yield f"{place}{name}"[:200]
    for name, inner in value.__dict__.items():
        if isinstance(inner, list):
            items = cast("list[Any]", inner)
            if items and isinstance(items[0], Wire):
                for index, item in enumerate(items):
                    yield from _unknown(item, f"{place}{name}[{index}].")
        elif type(inner) not in _PLAIN and isinstance(inner, Wire):
            yield from _unknown(inner, f"{place}{name}.")


def _header(names: Iterable[str]) -> dict[str, str]:
    shown = [name for name in sorted(names) if name.isascii() and name.isprintable() and len(name) <= 64]
    return {"x-ignored-parameters": ", ".join(shown[:MAX_NAMED])} if shown else {}
