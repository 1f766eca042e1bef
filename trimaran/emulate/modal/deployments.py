"""Apps by name and their deployments: what ``modal app history``, ``rollback``, ``info`` and ``logs`` ask for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from trimaran.emulate.modal.control import ControlPlane

LOG_POLL_S = 0.05
USER = "you"


@dataclass(frozen=True, slots=True)
class Version:
    """One deployment: what was published, when, and which earlier one it repeats."""

    number: int
    request: pb.AppPublishRequest
    deployed_at: float
    repeats: int = 0


@dataclass(slots=True)
class App:
    """An app and its deployments, oldest first."""

    app_id: str
    name: str
    created_at: float
    versions: list[Version] = field(default_factory=list[Version])

    def lifecycle(self) -> pb.AppLifecycle:
        """As the client shows it."""
        if not self.versions:
            return pb.AppLifecycle(app_state=pb.APP_STATE_INITIALIZING, created_at=self.created_at, created_by=USER)
        newest = self.versions[-1]
        return pb.AppLifecycle(
            app_state=pb.APP_STATE_DEPLOYED,
            created_at=self.created_at,
            created_by=USER,
            deployed_at=newest.deployed_at,
            deployed_by=USER,
            version=newest.number,
        )


class Deployments(ControlPlane):
    """The part of the control plane that knows more than one deploy.  ``published`` is what runs now."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.apps: dict[str, App] = {}
        self.log_files: Callable[[], list[tuple[str, Path]]] = list
        """Each container's id and the file of its output."""

    async def app_create(self, request: pb.AppCreateRequest) -> pb.AppCreateResponse:
        """A new app; it has a name when something is published under one."""
        app_id = self.new_id("ap")
        self.apps[app_id] = App(app_id, request.description, time.time())
        return pb.AppCreateResponse(app_id=app_id, app_page_url=self.url, app_logs_url=self.url)

    async def app_get_by_deployment_name(
        self, request: pb.AppGetByDeploymentNameRequest
    ) -> pb.AppGetByDeploymentNameResponse:
        """The deployed app of that name, if there is one."""
        for app in self.apps.values():
            if app.versions and app.name == request.name:
                return pb.AppGetByDeploymentNameResponse(
                    app_id=app.app_id, environment_name="main", lifecycle=app.lifecycle()
                )
        return pb.AppGetByDeploymentNameResponse(environment_name="main")

    async def app_get_layout(self, request: pb.AppGetLayoutRequest) -> pb.AppGetLayoutResponse:
        """Every deploy makes its functions anew here, so that a rollback finds the earlier ones as they were."""
        self._app(request.app_id)
        return pb.AppGetLayoutResponse(app_layout=pb.AppLayout())

    async def app_publish(self, request: pb.AppPublishRequest) -> pb.AppPublishResponse:
        """The deploy is complete."""
        app = self._app(request.app_id)
        app.name = request.name
        version = self._add(app, request)
        return pb.AppPublishResponse(url=self.url, deployed_at=version.deployed_at)

    async def app_deployment_history(self, request: pb.AppDeploymentHistoryRequest) -> pb.AppDeploymentHistoryResponse:
        """All deployments, newest first."""
        app = self._app(request.app_id)
        return pb.AppDeploymentHistoryResponse(
            production_app_version=len(app.versions),
            app_deployment_histories=[
                pb.AppDeploymentHistory(
                    app_id=app.app_id,
                    version=version.number,
                    client_version=version.request.client_version,
                    deployed_at=version.deployed_at,
                    deployed_by=USER,
                    tag=version.request.deployment_tag,
                    rollback_version=version.repeats,
                    rollback_allowed=True,
                    commit_info=version.request.commit_info,
                )
                for version in reversed(app.versions)
            ],
        )

    async def app_rollback(self, request: pb.AppRollbackRequest) -> pb.AppRollbackResponse:
        """Publish an earlier deployment again, as a new one; -1 is the one before the newest."""
        app = self._app(request.app_id)
        number = request.version if request.version > 0 else len(app.versions) + request.version
        if not 1 <= number <= len(app.versions):
            raise GRPCError(Status.INVALID_ARGUMENT, f"App {app.name} has no version {number} to roll back to")
        version = self._add(app, app.versions[number - 1].request, number)
        return pb.AppRollbackResponse(url=self.url, deployed_at=version.deployed_at)

    async def app_get_info(self, request: pb.AppGetInfoRequest) -> pb.AppGetInfoResponse:
        """Lifecycle and functions."""
        app = self._app(request.app_id)
        functions: Mapping[str, str] = app.versions[-1].request.function_ids if app.versions else {}
        info = pb.AppHandleMetadata(
            app_id=app.app_id, description=app.name, lifecycle=app.lifecycle(), functions=functions
        )
        return pb.AppGetInfoResponse(info=info)

    async def task_list(self, request: pb.TaskListRequest) -> pb.TaskListResponse:
        """The containers that run."""
        return pb.TaskListResponse(
            tasks=[pb.TaskStats(task_id=task_id, app_id=request.app_id) for task_id, _ in self.log_files()]
        )

    async def app_fetch_logs(self, request: pb.AppFetchLogsRequest) -> pb.AppFetchLogsResponse:
        """The containers' last lines."""
        lines = [(task_id, line) for task_id, file in self.log_files() for line in _lines(file, 0)[0]]
        return pb.AppFetchLogsResponse(batches=[_batch(task_id, line) for task_id, line in lines[-request.limit :]])

    async def app_get_logs(self, request: pb.AppGetLogsRequest) -> AsyncIterator[pb.TaskLogsBatch]:
        """What the containers print from now on."""
        seen = {task_id: file.stat().st_size for task_id, file in self.log_files()}
        ends = time.monotonic() + request.timeout
        while time.monotonic() < ends:
            for task_id, file in self.log_files():
                lines, seen[task_id] = _lines(file, seen.get(task_id, 0))
                for line in lines:
                    yield _batch(task_id, line)
            await asyncio.sleep(LOG_POLL_S)

    def _add(self, app: App, request: pb.AppPublishRequest, repeats: int = 0) -> Version:
        version = Version(len(app.versions) + 1, request, time.time(), repeats)
        app.versions.append(version)
        self.published = request
        return version

    def _app(self, app_id: str) -> App:
        if app_id not in self.apps:
            raise GRPCError(Status.NOT_FOUND, f"App {app_id} not found")
        return self.apps[app_id]


def _lines(file: Path, start: int) -> tuple[list[str], int]:
    """Whole lines from byte ``start`` on, and where the next one begins."""
    with file.open("rb") as stream:
        stream.seek(start)
        data = stream.read()
    whole = data[: data.rfind(b"\n") + 1]
    return whole.decode(errors="replace").splitlines(keepends=True), start + len(whole)


def _batch(task_id: str, line: str) -> pb.TaskLogsBatch:
    item = pb.TaskLogs(data=line, timestamp=time.time(), file_descriptor=pb.FILE_DESCRIPTOR_STDOUT)
    return pb.TaskLogsBatch(task_id=task_id, items=[item])
