"""The emulator: the control plane behind gRPC and the gateway behind HTTP, on loopback, in a thread of its own."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import tempfile
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Self, TypeVar

import grpclib.server
import uvicorn
from grpclib.const import Handler
from modal_proto import api_pb2 as pb
from modal_proto.api_grpc import ModalClientBase

from serve.errors import ConfigError
from trimaran.emulate.modal.calls import Calls
from trimaran.emulate.modal.container import Container
from trimaran.emulate.modal.control import SUCCESS
from trimaran.emulate.modal.gateway import Gateway

KNOWN_VERSIONS = ("1.6.4",)
"""Of the ``modal`` package: the emulator speaks its private protocol, which may change with each release."""

T = TypeVar("T")


def check_version() -> None:
    """Refuse a client whose protocol is not known.

    Raises:
        ConfigError: with the remedy.
    """
    import modal  # noqa: PLC0415

    if modal.__version__ not in KNOWN_VERSIONS:
        raise ConfigError(
            f"modal {modal.__version__} is not a version that the emulator knows ({', '.join(KNOWN_VERSIONS)}). "
            f"Run: pip install 'modal=={KNOWN_VERSIONS[-1]}'. Deploying to Modal itself does not need this."
        )


class _Names:
    """Stands for an implementation while the protocol's table is read."""

    def __getattr__(self, name: str) -> None:
        return None


class Emulator(Calls):
    """An account at Modal, on this machine.

    Args:
        home: Where its files go.  Default: a temporary folder.

    Raises:
        ConfigError: the installed ``modal`` is not one that is known.
    """

    def __init__(self, home: Path | None = None) -> None:
        check_version()
        self._temporary = tempfile.TemporaryDirectory(prefix="trimaran-modal-") if home is None else None
        self.home = Path(self._temporary.name) if self._temporary else Path(home or ".")
        super().__init__(self.home)
        self.requests: list[tuple[str, Any]] = []
        """Every call, by the protocol's name, in order."""
        self.unanswered: set[str] = set()
        """Calls that nothing here handles; they got an empty answer."""
        self.containers: list[Container] = []
        """Those that run now."""
        self.log_files = lambda: [(made.folder.name, made.folder / "log") for made in self.containers]
        self.gateway = Gateway(self)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="modal-emulator", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait(20)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        if self._temporary is not None:
            self._temporary.cleanup()

    def on_loop(self, function: Callable[[], T]) -> T:
        """Call ``function`` where the emulator's state lives."""

        async def call() -> T:
            return function()

        return self.wait(call())

    def wait(self, coroutine: Coroutine[Any, Any, T], timeout_s: float = 30.0) -> T:
        """Run ``coroutine`` on the emulator's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    def client_environment(self) -> dict[str, str]:
        """This process's environment, for a ``modal`` command that knows no other account."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("MODAL_")}
        return own | {
            "MODAL_SERVER_URL": f"http://127.0.0.1:{self.port}",
            "MODAL_TOKEN_ID": "ak-emulated",
            "MODAL_TOKEN_SECRET": "as-emulated",
            "MODAL_CONFIG_PATH": os.devnull,
        }

    def function_id(self, name: str) -> str:
        """The id of a function of the last deploy."""
        if self.published is None:
            raise LookupError("nothing was deployed")
        return self.published.function_ids[name]

    async def build(self, image_id: str) -> pb.GenericResult:
        """Run the layer's function, if it is one, in a real container entry point."""
        request = self.images[image_id]
        if not request.build_function_id:
            return SUCCESS
        function = self.variants(request.build_function_id)[0]
        layers = [base.image_id for base in request.image.base_images]
        container = Container(self, request.build_function_id, function, image_id=layers[0])
        call = self.run(container.translate(request.image.build_function.input))
        await asyncio.to_thread(container.start)
        try:
            ended = asyncio.create_task(asyncio.to_thread(container.process.wait))
            answer = asyncio.create_task(call.from_app.get())
            await asyncio.wait([ended, answer], return_when=asyncio.FIRST_COMPLETED)
            if answer.done() and isinstance(result := answer.result(), pb.GenericResult):
                return result
            return pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_FAILURE, exception=container.log())
        finally:
            await asyncio.to_thread(container.stop)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        # asyncio makes the sockets: others lack TCP_NODELAY, and small messages would wait 40 ms each.
        grpc = grpclib.server.Server([self])
        await grpc.start("127.0.0.1", 0)
        self.port: int = grpc._server.sockets[0].getsockname()[1]  # pyright: ignore
        config = uvicorn.Config(
            self.gateway, host="127.0.0.1", port=0, log_config=None, lifespan="off", interface="asgi3", access_log=False
        )
        web = uvicorn.Server(config)
        serving = asyncio.create_task(web.serve())
        while not web.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        self.url = f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        web.should_exit = web.force_exit = True
        await serving
        grpc.close()
        await grpc.wait_closed()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    def __mapping__(self) -> dict[str, Handler]:
        """The protocol's table, with our handlers; grpclib asks for it."""
        names: Any = _Names()
        wire: dict[str, Any] = ModalClientBase.__mapping__(names)
        return {
            path: Handler(self._handler(path.rpartition("/")[2], entry.reply_type), *entry[1:])
            for path, entry in wire.items()
        }

    def _handler(self, name: str, reply_type: Callable[[], Any]) -> Callable[[Any], Coroutine[Any, Any, None]]:
        own: Any = getattr(self, re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(), None)

        async def handle(stream: Any) -> None:
            request = await stream.recv_message()
            self.requests.append((name, request))
            if own is None:
                self.unanswered.add(name)
                await stream.send_message(reply_type())
            elif inspect.isasyncgenfunction(own):
                async for message in own(request):
                    await stream.send_message(message)
            else:
                await stream.send_message(await own(request) or reply_type())

        return handle
