"""The RunPod worker: ``python -u deploy/runpod/handler.py``.

One image, two modes (``SERVE_RUNPOD_MODE``).  ``http``: the same server as ``python -m serve``, for load balancing; the
SDK is never imported.  ``queue``: the SDK's job loop drives the same app in process.  Exit statuses are those of
``python -m serve``: 0 after a drain, 2 a setting is wrong, 3 the model cannot be loaded, 70 the engine died.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parent))  # beside this file, however it was started

from asgi_bridge import AppRequest, AppThread
from job_input import parse
from job_output import failure, pieces
from model_cache import choose
from runpod_settings import Mode, RunpodSettings, load_runpod_settings

from serve.__main__ import leave
from serve.errors import ConfigError, EngineDead, GenerationFailed, ServeError
from serve.observe import configure_logging
from serve.settings import LogFormat, Settings, load_settings, unknown_variables

logger = logging.getLogger("serve.runpod")

CALLER = "runpod"
TESTED = ("1.12.", "2.0.0rc2")
"""Versions of the SDK that the corrected scaler fits, by their beginnings."""

OVERFETCH = 2
"""With an SDK that this adapter was not tested with: its scaler counts every job twice."""

DEATH_TIMEOUT_S = 30.0
"""Seconds that a worker with a dead engine gets to send its errors."""


def main() -> int:
    """Run the worker; return its exit status."""
    try:
        own = load_runpod_settings()
        configure_logging(LogFormat.AUTO, "info")  # until the settings are known
        choose(os.environ, own.volume)
        if own.resolved_mode() is Mode.HTTP:
            from serve.__main__ import main as serve_main  # noqa: PLC0415

            os.environ.setdefault("SERVE_HOST", "0.0.0.0")  # noqa: S104 - settings demand keys for it
            return serve_main([])
        # No port is opened, so the address that would be bound does not matter.
        return serve_queue(load_settings(host="127.0.0.1"), own)
    except ConfigError as error:
        sys.stderr.write(f"{error.message}\n")
        return error.exit_status


def serve_queue(settings: Settings, own: RunpodSettings) -> int:
    """Load the model, then take jobs until a signal or the end of the engine."""
    from serve.api.app import create_app  # noqa: PLC0415
    from serve.api.auth import TRUSTED_CALLER  # noqa: PLC0415
    from serve.lifecycle import Lifecycle  # noqa: PLC0415

    configure_logging(settings.log_format, settings.log_level)
    for warning in unknown_variables(os.environ):
        logger.warning("%s", warning)
    app = create_app(settings)
    lifecycle: Lifecycle = app.state.lifecycle
    # Python as PID 1 would ignore the signal without a handler; the SDK installs its own when it starts.
    signal.signal(signal.SIGTERM, lambda *_: _leave_with_children(_status(lifecycle)))
    thread = AppThread(app, TRUSTED_CALLER)
    thread.start()
    start = _prepare_sdk()  # takes two seconds, while the model loads
    _wait_while_loading(thread, lifecycle)
    if lifecycle.failure is not None or not thread.is_alive:
        return _status(lifecycle) or 1
    lifecycle.on_failure(_end_worker)
    num_slots = thread.call(lifecycle.engine.stats).num_slots
    logger.info("Taking jobs: %d at once", num_slots)

    def end_requests() -> None:
        asyncio.run_coroutine_threadsafe(lifecycle.drain(0.0), thread.loop).result(5)

    answered: list[Callable[[str], None]] = []
    start(
        make_handler(thread, settings.served_name, num_slots, answered),
        num_slots,
        answered=answered,
        drain_timeout_s=settings.drain_timeout_s,
        delivery_timeout_s=own.delivery_timeout_s,
        end_requests=end_requests,
    )
    thread.stop(timeout_s=5.0)
    return _status(lifecycle)


def _status(lifecycle: Any) -> int:
    """The exit status that fits what happened."""
    return getattr(lifecycle.failure, "exit_status", EngineDead.exit_status) if lifecycle.failure else 0


def _wait_while_loading(thread: AppThread, lifecycle: Any) -> None:
    from serve.lifecycle import State  # noqa: PLC0415

    while lifecycle.state is State.LOADING and thread.is_alive:
        time.sleep(0.02)


def _end_worker(error: ServeError) -> None:
    """The engine died: let the jobs send their errors, then end, so that RunPod replaces the worker."""
    status = getattr(error, "exit_status", EngineDead.exit_status)
    logger.error("Ending with status %d: %s", status, error.message)
    os.kill(os.getpid(), signal.SIGTERM)
    timer = threading.Timer(DEATH_TIMEOUT_S, _leave_with_children, [status])
    timer.daemon = True
    timer.start()


def make_handler(
    thread: AppThread, model: str, num_slots: int, answered: Sequence[Callable[[str], None]] = ()
) -> Callable[[dict[str, Any]], AsyncIterator[Any]]:
    """The handler: an async generator *function*, since the SDK looks at the function itself.

    ``answered`` are called with a job's id when its slot is free again, which is before its answer is delivered.
    """
    slots = asyncio.Semaphore(num_slots)

    def leave_slot(job_id: str) -> None:
        slots.release()
        for call in answered:
            call(job_id)

    async def handler(job: dict[str, Any]) -> AsyncIterator[Any]:
        try:
            request = parse(job.get("input"), model)
        except ServeError as error:
            yield failure(error)
            return
        wanted = AppRequest(request.method, request.target, request.encoded_body(), CALLER, job["id"])
        await slots.acquire()
        exchange = thread.open(wanted, lambda: leave_slot(job["id"]))
        # The SDK cancels the job's task.  If that task is sending a piece, this generator is suspended at a yield and
        # nobody closes it: the end of the task must.
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        task.add_done_callback(lambda _: exchange.close())
        try:
            async for piece in pieces(exchange, request):
                yield piece
        except Exception:
            logger.exception("Unexpected error in job %s", job["id"])
            yield failure(GenerationFailed(f"internal error; tell the operator the job's id {job['id']}"))
        finally:
            exchange.close()

    return handler


def _prepare_sdk() -> Callable[..., None]:
    """Import and check the SDK; return what starts it.

    Raises:
        ConfigError: this version cannot run the worker.
    """
    # Its default, DEBUG, logs every piece of text.
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")
    import runpod.serverless  # noqa: PLC0415
    from runpod.version import __version__ as version  # noqa: PLC0415

    is_tested = check_version(version)
    if is_tested:
        import job_scaler  # noqa: PLC0415

        job_scaler.install()
    else:
        logger.warning("runpod %s was not tested with this adapter: its own scaler takes the jobs", version)

    def start(handler: Any, num_slots: int, **options: Any) -> None:
        _let_children_die_with_us()
        taken = num_slots if is_tested else max(3, OVERFETCH * num_slots)
        runpod.serverless.start(
            {
                "handler": handler,
                "concurrency_modifier": lambda _current: taken,
                "return_aggregate_stream": True,
                "num_slots": num_slots,
                **options,
            }
        )

    return start


def check_version(version: str) -> bool:
    """Whether the corrected scaler fits this version of the SDK.

    Raises:
        ConfigError: the SDK is too old to cancel jobs, or too new to be known.
    """
    if version.startswith(TESTED):
        return True
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < (1, 10):
        raise ConfigError(f"runpod {version} cannot cancel jobs: install 'runpod>=1.12,<1.13'")
    if major > 1:
        raise ConfigError(f"runpod {version} was not tested with this adapter: install 'runpod>=1.12,<1.13'")
    return False


def _let_children_die_with_us() -> None:
    """The SDK's heartbeat is a process that would go on reporting the jobs of a killed worker."""
    if sys.platform != "linux":
        return
    import ctypes  # noqa: PLC0415

    prctl = ctypes.CDLL(None).prctl
    pr_set_pdeathsig = 1
    multiprocessing.set_start_method("fork", force=True)  # as the SDK was made for; Python 3.14 would choose another
    os.register_at_fork(after_in_child=lambda: prctl(pr_set_pdeathsig, signal.SIGKILL))


def _leave_with_children(status: int) -> NoReturn:
    for child in multiprocessing.active_children():
        child.kill()
    leave(status)


if __name__ == "__main__":
    _leave_with_children(main())
