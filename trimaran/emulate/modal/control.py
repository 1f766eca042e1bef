"""What ``modal deploy`` asks of the control plane.  Everything is kept, so that it can be shown and tested."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from trimaran.emulate.modal.store import Store

BUILDER_VERSION = "2025.06"
SUCCESS = pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_SUCCESS)
IMAGE_PYTHON = "Python 3.12"


class ControlPlane:
    """Handlers are named as their RPC, in snake case.

    Args:
        home: An empty folder.
        url: Where the web gateway listens.
    """

    def __init__(self, home: Path) -> None:
        self.url = ""
        self.store = Store(home)
        self.images: dict[str, pb.ImageGetOrCreateRequest] = {}
        self.mounts: dict[str, list[pb.MountFile]] = {}
        self.secrets: dict[str, pb.SecretGetOrCreateRequest] = {}
        self.stored_secrets: dict[str, dict[str, str]] = {}
        """What ``modal secret create`` would have made."""
        self.volumes: dict[str, pb.VolumeGetOrCreateRequest] = {}
        self.functions: dict[str, pb.FunctionCreateRequest] = {}
        self.metadata: dict[str, pb.FunctionHandleMetadata] = {}
        self.published: pb.AppPublishRequest | None = None
        self.rates: dict[str, str] = {}
        """Dollars a unit and hour, as ``modal billing rates`` shows them."""
        self._ids = itertools.count(1)

    def new_id(self, prefix: str) -> str:
        """An id as Modal's look."""
        return f"{prefix}-{next(self._ids)}"

    async def environment_get_or_create(
        self, request: pb.EnvironmentGetOrCreateRequest
    ) -> pb.EnvironmentGetOrCreateResponse:
        """There is one environment, whatever its name."""
        settings = pb.EnvironmentSettings(image_builder_version=BUILDER_VERSION)
        metadata = pb.EnvironmentMetadata(name=request.deployment_name or "main", settings=settings)
        return pb.EnvironmentGetOrCreateResponse(environment_id="en-1", metadata=metadata)

    async def workspace_billing_rates(
        self, request: pb.WorkspaceBillingRatesRequest
    ) -> pb.WorkspaceBillingRatesResponse:
        """Today's prices."""
        del request
        return pb.WorkspaceBillingRatesResponse(rates=self.rates)

    async def mount_batched_check_existence(
        self, request: pb.MountBatchedCheckExistenceRequest
    ) -> pb.MountBatchedCheckExistenceResponse:
        """Which contents are still to be sent."""
        missing = [name for name in request.sha256_hex_hashes if not self.store.has(name)]
        return pb.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)

    async def mount_put_file(self, request: pb.MountPutFileRequest) -> pb.MountPutFileResponse:
        """Contents, inline or as an upload; with neither, whether they are here."""
        kind = request.WhichOneof("data_oneof")
        if kind == "data":
            self.store.put(request.sha256_hex, request.data)
        elif kind == "data_blob_id":
            self.store.adopt(request.sha256_hex, request.data_blob_id)
        return pb.MountPutFileResponse(exists=self.store.has(request.sha256_hex))

    async def mount_get_or_create(self, request: pb.MountGetOrCreateRequest) -> pb.MountGetOrCreateResponse:
        """A mount: paths and contents.  Modal's own, by name, have none here."""
        mount_id = self.new_id("mo")
        self.mounts[mount_id] = list(request.files)
        return pb.MountGetOrCreateResponse(
            mount_id=mount_id, handle_metadata=pb.MountHandleMetadata(content_checksum_sha256_hex="0")
        )

    async def blob_create(self, request: pb.BlobCreateRequest) -> pb.BlobCreateResponse:
        """An address to put a large file."""
        del request
        name = self.new_id("bl") + secrets.token_hex(8)
        return pb.BlobCreateResponse(blob_ids=[name], upload_urls=pb.UploadUrlList(items=[f"{self.url}/blobs/{name}"]))

    async def volume_get_or_create(self, request: pb.VolumeGetOrCreateRequest) -> pb.VolumeGetOrCreateResponse:
        """One Volume a name."""
        known = (key for key, made in self.volumes.items() if made.deployment_name == request.deployment_name)
        volume_id = next(known, None)
        if volume_id is None:
            if not request.object_creation_type:
                raise GRPCError(Status.NOT_FOUND, f"Volume '{request.deployment_name}' not found")
            volume_id = self.new_id("vo")
            self.volumes[volume_id] = request
            self.store.volume(volume_id)
        version = pb.VOLUME_FS_VERSION_V1
        return pb.VolumeGetOrCreateResponse(
            volume_id=volume_id,
            version=version,
            metadata=pb.VolumeMetadata(version=version, name=request.deployment_name),
        )

    async def volume_put_files(self, request: pb.VolumePutFilesRequest) -> None:
        """All files of an upload appear at once."""
        self.store.put_files(request.volume_id, request.files)

    async def secret_get_or_create(self, request: pb.SecretGetOrCreateRequest) -> pb.SecretGetOrCreateResponse:
        """A secret of the app, or a stored one by its name."""
        is_stored = request.deployment_name in self.stored_secrets
        if request.deployment_name and not request.object_creation_type and not is_stored:
            raise GRPCError(Status.NOT_FOUND, f"Secret '{request.deployment_name}' not found in environment 'main'")
        secret_id = self.new_id("st")
        self.secrets[secret_id] = request
        return pb.SecretGetOrCreateResponse(secret_id=secret_id)

    def variables(self, secret_id: str) -> dict[str, str]:
        """What a secret puts into the environment."""
        request = self.secrets[secret_id]
        return dict(request.env_dict) or self.stored_secrets.get(request.deployment_name, {})

    async def image_get_or_create(self, request: pb.ImageGetOrCreateRequest) -> pb.ImageGetOrCreateResponse:
        """A layer; the same definition is the same image."""
        same = (key for key, made in self.images.items() if made.image == request.image)
        image_id = next(same, None) or self.new_id("im")
        self.images.setdefault(image_id, request)
        return pb.ImageGetOrCreateResponse(image_id=image_id)

    async def image_join_streaming(
        self, request: pb.ImageJoinStreamingRequest
    ) -> AsyncIterator[pb.ImageJoinStreamingResponse]:
        """The build is over at once: nothing is installed here, this Python is used."""
        result = await self.build(request.image_id)
        metadata = pb.ImageMetadata(image_builder_version=BUILDER_VERSION, python_version_info=IMAGE_PYTHON)
        yield pb.ImageJoinStreamingResponse(result=result, eof=True, metadata=metadata)

    async def build(self, image_id: str) -> pb.GenericResult:
        """Run what the layer runs.  Overridden where functions can be run."""
        del image_id
        return SUCCESS

    def layers(self, image_id: str) -> list[pb.Image]:
        """An image from its base to its last layer."""
        image = self.images[image_id].image
        return [*(layer for base in image.base_images for layer in self.layers(base.image_id)), image]

    def _describe(
        self, function_id: str, function: pb.Function | pb.FunctionPrecreateRequest
    ) -> pb.FunctionHandleMetadata:
        described = pb.FunctionHandleMetadata(function_name=function.function_name, definition_id=f"de-{function_id}")
        if function.webhook_config.type:
            described.web_url = self.url
        for name, method in function.method_definitions.items():
            url = self.url if method.webhook_config.type else ""
            described.method_handle_metadata[name].CopyFrom(
                pb.FunctionHandleMetadata(
                    function_name=method.function_name, definition_id=f"de-{function_id}", web_url=url
                )
            )
        self.metadata[function_id] = described
        return described

    async def function_precreate(self, request: pb.FunctionPrecreateRequest) -> pb.FunctionPrecreateResponse:
        """An id before the definition."""
        function_id = request.existing_function_id or self.new_id("fu")
        described = self._describe(function_id, request)
        return pb.FunctionPrecreateResponse(function_id=function_id, handle_metadata=described)

    async def function_create(self, request: pb.FunctionCreateRequest) -> pb.FunctionCreateResponse:
        """The definition; with a list of GPUs there is one for each."""
        function_id = request.existing_function_id or self.new_id("fu")
        self.functions[function_id] = request
        function = self.variants(function_id)[0]
        data = request.function_data
        if request.HasField("function"):
            ranked = [pb.FunctionData.RankedFunction(function=function)]
            data = pb.FunctionData(
                function_name=function.function_name,
                http_config=function.http_config,
                is_server=function.is_server,
                ranked_functions=ranked,
            )
        return pb.FunctionCreateResponse(
            function_id=function_id,
            function=request.function,
            function_data=data,
            handle_metadata=self._describe(function_id, function),
        )

    def variants(self, function_id: str) -> list[pb.Function]:
        """A function's definitions: one, or one for each GPU of a list."""
        request = self.functions[function_id]
        if request.HasField("function"):
            return [request.function]
        return [ranked.function for ranked in request.function_data.ranked_functions]

    async def class_create(self, request: pb.ClassCreateRequest) -> pb.ClassCreateResponse:
        """A class is its one function here."""
        del request
        return pb.ClassCreateResponse(class_id=self.new_id("cs"))
