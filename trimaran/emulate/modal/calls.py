"""What a container asks for: inputs, the messages of each call, results, and whether it shall end."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from modal_proto import api_pb2 as pb

from trimaran.emulate.modal.deployments import Deployments

ASGI = pb.DATA_FORMAT_ASGI
POLL_S = 20.0


@dataclass
class Call:
    """One request on its way through a container: ASGI messages in, ASGI messages or the result out."""

    call_id: str
    input_id: str
    path: str = ""
    to_app: asyncio.Queue[dict[str, Any] | None] = field(default_factory=asyncio.Queue[dict[str, Any] | None])
    from_app: asyncio.Queue[dict[str, Any] | pb.GenericResult] = field(
        default_factory=asyncio.Queue[dict[str, Any] | pb.GenericResult]
    )


class Calls(Deployments):
    """The container's side of the control plane.  All on one event loop."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls: dict[str, Call] = {}
        self.failures: list[pb.GenericResult] = []
        """How containers failed to start."""
        self.on_checkpoint: Callable[[], None] = lambda: None
        self._inputs: asyncio.Queue[pb.FunctionGetInputsItem] = asyncio.Queue()
        self._cancelled: list[str] = []

    def begin(self, method: str, scope: dict[str, Any]) -> Call:
        """Queue a web request for the next container."""
        arguments = pb.FunctionInput(
            args=pickle.dumps(((scope,), {})), data_format=pb.DATA_FORMAT_PICKLE, method_name=method
        )
        call = self.run(arguments)
        call.path = scope["path"]
        return call

    def run(self, arguments: pb.FunctionInput) -> Call:
        """Queue an ordinary call."""
        call = Call(self.new_id("fc"), self.new_id("in"))
        self.calls[call.call_id] = call
        self._inputs.put_nowait(
            pb.FunctionGetInputsItem(input_id=call.input_id, function_call_id=call.call_id, input=arguments)
        )
        return call

    def cancel(self, call: Call) -> None:
        """Cancel as Modal does: with the answer to the next heartbeat."""
        self._cancelled.append(call.input_id)

    def end_container(self) -> None:
        """Ask a container to end when its calls are done."""
        self._inputs.put_nowait(pb.FunctionGetInputsItem(kill_switch=True))

    async def function_get_inputs(self, request: pb.FunctionGetInputsRequest) -> pb.FunctionGetInputsResponse:
        """The next input, or nothing for now."""
        del request
        try:
            item = await asyncio.wait_for(self._inputs.get(), POLL_S)
        except TimeoutError:
            return pb.FunctionGetInputsResponse()
        return pb.FunctionGetInputsResponse(inputs=[item])

    async def function_call_get_data_in(self, request: pb.FunctionCallGetDataRequest) -> AsyncIterator[pb.DataChunk]:
        """ASGI messages to the app, as they come."""
        from modal._serialization import serialize_data_format  # noqa: PLC0415

        index, messages = 0, self.calls[request.function_call_id].to_app
        while (message := await messages.get()) is not None:
            index += 1
            yield pb.DataChunk(data_format=ASGI, data=serialize_data_format(message, ASGI), index=index)

    async def function_call_put_data_out(self, request: pb.FunctionCallPutDataRequest) -> None:
        """ASGI messages from the app."""
        from modal import _serialization  # noqa: PLC0415

        decode: Callable[..., Any] = getattr(_serialization, "deserialize_data_format")  # noqa: B009 - half typed
        for chunk in request.data_chunks:
            if chunk.data_format == ASGI and (call := self.calls.get(request.function_call_id)):
                call.from_app.put_nowait(decode(chunk.data, chunk.data_format, None))

    async def function_put_outputs(self, request: pb.FunctionPutOutputsRequest) -> None:
        """A call has ended."""
        for output in request.outputs:
            for call in list(self.calls.values()):
                if call.input_id == output.input_id:
                    del self.calls[call.call_id]
                    call.from_app.put_nowait(output.result)

    async def container_heartbeat(self, request: pb.ContainerHeartbeatRequest) -> pb.ContainerHeartbeatResponse:
        """Alive; the answer may cancel inputs."""
        del request
        cancelled, self._cancelled = self._cancelled, []
        event = pb.CancelInputEvent(input_ids=cancelled) if cancelled else None
        return pb.ContainerHeartbeatResponse(cancel_input_event=event)

    async def function_get_dynamic_concurrency(
        self, request: pb.FunctionGetDynamicConcurrencyRequest
    ) -> pb.FunctionGetDynamicConcurrencyResponse:
        """How many inputs at once: all that the function allows, since no other container could take them."""
        return pb.FunctionGetDynamicConcurrencyResponse(concurrency=request.max_concurrency)

    async def container_checkpoint(self, request: pb.ContainerCheckpointRequest) -> None:
        """The container may be frozen now."""
        del request
        self.on_checkpoint()

    async def task_result(self, request: pb.TaskResultRequest) -> None:
        """A container could not start."""
        self.failures.append(request.result)
