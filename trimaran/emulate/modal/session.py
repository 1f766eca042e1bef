"""``trimaran emulate modal``: the real ``modal deploy``, what it would create, and the real container, on loopback."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from serve.errors import ConfigError, ModelLoadError
from trimaran.config.defaults import emulated_variables
from trimaran.emulate.modal.container import Container, is_loopback
from trimaran.emulate.modal.service import Emulator
from trimaran.emulate.modal.tree import tree
from trimaran.platforms.modal.client import ADAPTER, check_adapter

READY_S = 600.0


def run(model: str | None, question: str | None) -> None:
    """Deploy, show, serve; ask ``question`` and end, or serve until Ctrl-C without one.

    Raises:
        ConfigError: something is missing on this machine, or the deploy was refused.
        ModelLoadError: the container did not start.
    """
    environment, key = prepare_environment(model)
    with Emulator() as emulator:
        deploy(emulator, environment)
        click.echo("\n" + tree(emulator) + "\n")
        container = start(emulator)
        try:
            wait_until_ready(container, key)
            click.echo(advice(container.url, key))
            if question is None:
                serve_until_interrupted(container)
            else:
                click.echo(f"\n> {question}\n")
                for text in ask(container.url, key, question):
                    click.echo(text, nl=False)
                click.echo()
        finally:
            container.stop()


def prepare_environment(model: str | None) -> tuple[dict[str, str], str]:
    """This process's environment with a model and a key in it, and the key.

    Raises:
        ConfigError: there is no adapter, or the model would have to come from the Hub.
    """
    check_adapter()
    environment = {**emulated_variables(), **os.environ}
    if model is not None:
        environment["SERVE_MODEL"] = model
    if not environment.get("SERVE_MODEL") and environment.get("SERVE_ENGINE") != "echo":
        from trimaran import demo_model  # noqa: PLC0415

        environment["SERVE_MODEL"] = str(demo_model.prepare())
    name = environment.get("SERVE_MODEL", "")
    if not is_loopback(environment.get("HF_ENDPOINT", "")):
        environment["HF_HUB_OFFLINE"] = "1"
        if name and not Path(name).expanduser().is_dir():
            raise ConfigError(
                f"the emulator never leaves this machine, and {name} is no folder here; "
                f'name one: trimaran emulate modal "$(hf download {name})"'
            )
    if not environment.get("SERVE_API_KEYS") and not environment.get("SERVE_ALLOW_ANONYMOUS"):
        environment["SERVE_API_KEYS"] = f"sk-{secrets.token_hex(16)}"
    return environment, environment.get("SERVE_API_KEYS", "").partition(",")[0].strip()


def deploy(emulator: Emulator, environment: dict[str, str]) -> str:
    """Run the real command against the emulator; its output is shown and returned.

    Raises:
        ConfigError: it failed; its output says why.
    """
    command = [sys.executable, "-m", "modal", "deploy", str(ADAPTER)]
    click.echo("$ modal deploy deploy/modal/app.py", err=True)
    process = subprocess.Popen(  # noqa: S603
        command,
        env=environment | emulator.client_environment() | {"COLUMNS": "200"},
        cwd=ADAPTER.parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = ""
    for line in process.stdout or ():
        output += line
        click.echo(line, nl=False, err=True)
    if process.wait() != 0:
        raise ConfigError("the deploy was refused; the reason is above")
    return output


def start(emulator: Emulator, **environment: str) -> Container:
    """Start the container of the one function that was deployed."""
    if emulator.published is None:
        raise LookupError("nothing was deployed")
    (function_id,) = emulator.published.function_ids.values()
    container = Container(emulator, function_id, emulator.variants(function_id)[0], environment=environment)
    container.start()
    return container


def wait_until_ready(container: Container, key: str) -> None:
    """Until requests are answered.

    Raises:
        ModelLoadError: the container ended first; the message holds the end of its log.
    """
    began = time.monotonic()
    while time.monotonic() - began < READY_S:
        if container.process.poll() is not None:
            raise ModelLoadError(f"the container ended before it was ready:\n{container.log()[-3000:]}")
        try:
            if _get(container.url, "/ready", key) == http.client.OK:
                click.echo(f"The container is ready after {time.monotonic() - began:.1f} s.", err=True)
                return
        except OSError:
            time.sleep(0.1)
    raise ModelLoadError(f"the container was not ready after {READY_S:.0f} s:\n{container.log()[-3000:]}")


def _get(url: str, path: str, key: str) -> int:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=2)
    try:
        connection.request("GET", path, headers={"authorization": f"Bearer {key}"})
        return connection.getresponse().status
    finally:
        connection.close()


def ask(url: str, key: str, question: str) -> Iterator[str]:
    """The pieces of a streamed answer, as they come."""
    body = {"messages": [{"role": "user", "content": question}], "stream": True, "max_tokens": 64, "temperature": 0}
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
    try:
        connection.request("GET", "/v1/models", headers=headers)
        body["model"] = json.loads(connection.getresponse().read())["data"][0]["id"]
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        for line in connection.getresponse():
            data = line.decode().removeprefix("data: ").strip()
            if data and not data.startswith(("[DONE]", ":")):
                yield from (choice["delta"].get("content") or "" for choice in json.loads(data)["choices"])
    finally:
        connection.close()


def advice(url: str, key: str) -> str:
    """What to try next."""
    return (
        f"Playground: {url}/\n"
        f'curl -N {url}/v1/chat/completions -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\\n'
        """  -d '{"model": "<see /v1/models>", "stream": true, "messages": [{"role": "user", "content": "Hello!"}]}'"""
    )


def serve_until_interrupted(container: Container) -> None:
    """Wait for Ctrl-C, or for the container's own end."""
    click.echo("\nServing until Ctrl-C ...", err=True)
    try:
        container.process.wait()
        click.echo(container.log()[-3000:], err=True)
    except KeyboardInterrupt:
        click.echo("\nEnding the container ...", err=True)
