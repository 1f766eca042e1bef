"""``trimaran emulate runpod``."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
from pathlib import Path

import click

from serve.errors import ConfigError


@click.command("runpod", epilog='Example: trimaran emulate runpod --workers 2 --fault "job-stream:500x2"')
@click.option("--port", type=click.IntRange(0, 65535), default=8010, show_default=True, help="Port on loopback.")
@click.option("--workers", type=click.IntRange(0, 64), default=1, show_default=True, help="Real workers to start.")
@click.option("--endpoint", default="local", show_default=True, help="The endpoint's id in the address.")
@click.option("--key", default="local-key", show_default=True, envvar="RUNPOD_API_KEY", help="The API key to accept.")
@click.option("--fault", "faults", multiple=True, help="ROUTE:STATUS or ROUTE:SECONDSs, each with xTIMES; repeatable.")
@click.option("--long-poll", type=float, default=20.0, show_default=True, help="Seconds that take and stop are held.")
@click.option("--dead-after", type=float, default=30.0, show_default=True, help="Seconds without a ping.")
@click.option("--handler", type=click.Path(path_type=Path), help="Default: deploy/runpod/handler.py.")
@click.argument("model", required=False)
def runpod(
    port: int,
    workers: int,
    endpoint: str,
    key: str,
    faults: tuple[str, ...],
    long_poll: float,
    dead_after: float,
    handler: Path | None,
    model: str | None,
) -> None:
    """Run RunPod's queue on this machine, with real workers that serve MODEL.

    Clients reach it at http://127.0.0.1:PORT/v2/ENDPOINT as they would api.runpod.ai: run, runsync, status, stream,
    cancel, retry, health, purge-queue and openai/v1.  Each worker is a process that runs the real SDK; its settings are
    read from the environment (SERVE_*).  Without MODEL, SERVE_MODEL or SERVE_ENGINE it serves the demo model.
    """
    from trimaran.emulate.runpod.faults import parse_fault  # noqa: PLC0415
    from trimaran.emulate.runpod.plane import Plane  # noqa: PLC0415
    from trimaran.emulate.runpod.workers import find_handler  # noqa: PLC0415

    if workers and handler is None and importlib.util.find_spec("runpod") is None:
        raise ConfigError("workers run RunPod's own SDK, which is not installed; run: pip install -e '.[runpod]'")
    plane = Plane(endpoint, key, long_poll_s=long_poll, dead_after_s=dead_after)
    for fault in faults:
        plane.faults.add(parse_fault(fault))
    path = find_handler(handler) if workers else Path()
    environment = {"SERVE_MODEL": _model(model)} if workers else {}
    status = asyncio.run(_serve(plane, port, workers, path, {k: v for k, v in environment.items() if v}))
    click.get_current_context().exit(status)


def _model(given: str | None) -> str:
    from trimaran.config.defaults import engine_in_force, model_in_force  # noqa: PLC0415

    if given or model_in_force() or engine_in_force():
        return given or ""
    from trimaran import demo_model  # noqa: PLC0415

    return str(demo_model.prepare())


async def _serve(plane: object, port: int, num_workers: int, handler: Path, environment: dict[str, str]) -> int:
    """Listen, keep the workers running, and end both on a signal: the workers first, while they still have a queue."""
    from trimaran.emulate.runpod.plane import Plane  # noqa: PLC0415
    from trimaran.emulate.runpod.workers import Crew  # noqa: PLC0415
    from trimaran.emulate.server import serving  # noqa: PLC0415

    assert isinstance(plane, Plane)  # noqa: S101 - typed late, since the module is imported late
    stop = asyncio.Event()
    for sig in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(sig, stop.set)
    async with serving(plane.app, port) as url:
        base = f"{url}/v2/{plane.endpoint}"
        click.echo(
            f"Listening on {url}\n  jobs    {base}/run\n  OpenAI  {base}/openai/v1\n  key     {plane.key}", err=True
        )
        crew = asyncio.create_task(Crew(plane, url, handler, environment).work(num_workers))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({crew, stopped}, return_when=asyncio.FIRST_COMPLETED)
        status = crew.result() if crew.done() else 0
        crew.cancel()
        await asyncio.gather(crew, return_exceptions=True)
    return status
