"""``trimaran keys``: makes, lists and revokes the keys of a file that servers read."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from serve.errors import ServeError
from serve.keys import HASHED, ApiKey, Scope, check_name, digest_of, new_secret, read_keys, write_keys

_file = click.option(
    "--file",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="SERVE_API_KEYS_FILE",
    help="The file of keys. Default: SERVE_API_KEYS_FILE.",
)


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _when(text: str) -> datetime:
    """A day or a moment (UTC), or so many days or hours from now."""
    if span := re.fullmatch(r"(\d{1,5})([dh])", text):
        return datetime.now(UTC) + int(span[1]) * timedelta(hours=24 if span[2] == "d" else 1)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither like 90d or 12h nor a date like 2027-01-31") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


@click.group(epilog="Example: trimaran keys new --file keys.json --name ci")
def keys() -> None:
    """Make, list and revoke API keys.

    A file of keys (SERVE_API_KEYS_FILE) holds only hashes. Servers that read it take changes within seconds.
    """


@keys.command(epilog="Example: trimaran keys new --file keys.json --name ci --expires 90d")
@_file
@click.option("--name", default="", help="Whose it is. Keys of one name share limits and records. Default: its own id.")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice([scope.value for scope in Scope]),
    multiple=True,
    help="What it may do; may be repeated: inference (the default), admin (/metrics, /usage).",
)
@click.option("--expires", type=_when, metavar="WHEN", help="When it ends: 90d, 12h, or a date. Default: never.")
@_json
def new(file: Path | None, name: str, scopes: tuple[str, ...], expires: datetime | None, as_json: bool) -> None:
    """Make a key and print it: the only time that it is seen.

    Without a file nothing is kept: put the key, or the hash that is printed with it, into SERVE_API_KEYS.
    """
    secret = new_secret()
    key = ApiKey(
        digest=digest_of(secret.encode()),
        name=check_name(name) if name else "",
        scopes=frozenset(Scope(scope) for scope in scopes or (Scope.INFERENCE,)),
        created_at=datetime.now(UTC).replace(microsecond=0),
        expires_at=expires.replace(microsecond=0) if expires else None,
    )
    if file is not None:
        write_keys(file, [*(read_keys(file) if file.exists() else ()), key])
        click.echo(f"{key.id} is in {file}; this is the key:", err=True)
    elif name or scopes or expires:
        raise click.UsageError("a name, scopes and an expiry need a file to be kept in: --file keys.json")
    else:
        click.echo(f"For SERVE_API_KEYS, the key or this hash: {HASHED}{key.digest.hex()}", err=True)
    click.echo(json.dumps({**_shown(key), "key": secret}) if as_json else secret)


@keys.command("list", epilog="Example: trimaran keys list --file keys.json")
@_file
@_json
def list_keys(file: Path | None, as_json: bool) -> None:
    """Print the keys of a file, without the keys."""
    now = datetime.now(UTC).timestamp()
    found = read_keys(_given(file))
    if as_json:
        click.echo(json.dumps([{**_shown(key), "is_expired": key.is_expired(now)} for key in found], indent=2))
        return
    lines = [("id", "name", "scopes", "made", "expires")]
    for key in found:
        ends = "never" if key.expires_at is None else f"{key.expires_at:%Y-%m-%d %H:%M}"
        made = f"{key.created_at:%Y-%m-%d}" if key.created_at else ""
        lines.append((key.id, key.name, ",".join(sorted(key.scopes)), made, ends + " (over)" * key.is_expired(now)))
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@keys.command(epilog="Example: trimaran keys revoke --file keys.json key-1f0c2a9b")
@_file
@click.argument("key_ids", metavar="ID...", nargs=-1, required=True)
@_json
def revoke(file: Path | None, key_ids: tuple[str, ...], as_json: bool) -> None:
    """Take keys out of a file, by the ids that `trimaran keys list` prints."""
    path = _given(file)
    known = read_keys(path)
    if unknown := sorted(set(key_ids) - {key.id for key in known}):
        raise ServeError(f"there is no key {unknown[0]} in {path}; trimaran keys list --file {path} prints them")
    write_keys(path, [key for key in known if key.id not in key_ids])
    said = f"{', '.join(key_ids)}: servers refuse it within seconds"
    click.echo(json.dumps({"revoked": list(key_ids)}) if as_json else said)


def _shown(key: ApiKey) -> dict[str, Any]:
    """All of it but the key and its hash."""
    return {
        "id": key.id,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "created_at": key.created_at.isoformat() if key.created_at else None,
        "expires_at": key.expires_at.isoformat() if key.expires_at else None,
    }


def _given(file: Path | None) -> Path:
    if file is None:
        raise click.UsageError("name the file of keys: --file keys.json, or set SERVE_API_KEYS_FILE")
    return file
