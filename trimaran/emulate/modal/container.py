"""A container: Modal's real entry point in a process that sees only what the deploy gave it."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from modal_proto import api_pb2 as pb

if TYPE_CHECKING:
    from trimaran.emulate.modal.service import Emulator

HOME = "/root"
KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
STOP_S = 40.0


class Container:
    """One container of one function.

    Its files are the function's mounts below a scratch folder, its packages those of this Python (but nothing that is
    only linked into it, such as a checkout), its environment the image's, the secrets' and what Modal adds.
    Absolute paths that the deploy names are translated, since the process is not locked into its folder.
    """

    def __init__(
        self,
        plane: Emulator,
        function_id: str,
        function: pb.Function,
        *,
        image_id: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._plane = plane
        self._function_id = function_id
        self._function = pb.Function.FromString(function.SerializeToString())
        self._image_id = image_id or function.image_id
        self._extra = dict(environment or {})
        self.folder = plane.home / "containers" / plane.new_id("ta")
        self._mounted = {HOME: self.folder / "root"}
        for mount in function.volume_mounts:
            self._mounted[mount.mount_path] = plane.store.volume(mount.volume_id)
        self.held_at_checkpoint: list[str] = []
        """Files of a Volume that were open or mapped when the snapshot was taken."""
        self.port = _free_port() if function.is_server else 0
        self.process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """Where it can be reached."""
        return f"http://127.0.0.1:{self.port}" if self.port else self._plane.url

    def start(self) -> None:
        """Lay out the files and start the process; returns at once."""
        home = self._mounted[HOME]
        home.mkdir(parents=True)
        for mount_id in self._function.mount_ids:
            self._plane.store.lay_out(self.folder, self._plane.mounts.get(mount_id, []))
        environment = self._environment()
        (self.folder / "arguments").write_bytes(self._arguments().SerializeToString())
        if self._function.is_class and not self._function.is_server:
            methods = self._function.method_definitions
            self._plane.gateway.method = next(name for name, made in methods.items() if made.webhook_config.type)
        self._plane.on_checkpoint = self._checkpoint
        with (self.folder / "log").open("wb") as log:
            # -S: no .pth files, and so no checkout that is installed for editing.
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-m", "modal._container_entrypoint"],
                cwd=home,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._plane.containers.append(self)

    def log(self) -> str:
        """Everything it has printed."""
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    def stop(self) -> int:
        """End it as Modal does, and return its exit status."""
        if self.process.poll() is None:
            if self._function.is_server:
                self.process.send_signal(signal.SIGTERM)
            else:
                self._plane.on_loop(self._plane.end_container)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        if not self._function.is_builder_function:
            self._plane.gateway.method = None
        if self in self._plane.containers:
            self._plane.containers.remove(self)
        return self.process.wait()

    def translate(self, arguments: pb.FunctionInput) -> pb.FunctionInput:
        """A call's arguments with the paths that hold here."""
        made = pb.FunctionInput.FromString(arguments.SerializeToString())
        positional, named = pickle.loads(arguments.args)  # noqa: S301 - from the deploy that we started
        positional = tuple(self._local(value) if isinstance(value, str) else value for value in positional)
        made.args = pickle.dumps((positional, named))
        made.data_format = pb.DATA_FORMAT_PICKLE
        return made

    def _local(self, path: str) -> str:
        for remote, local in self._mounted.items():
            if path == remote or path.startswith(f"{remote}/"):
                return str(local) + path.removeprefix(remote)
        return path

    def _environment(self) -> dict[str, str]:
        from_deploy: dict[str, str] = {}
        for layer in self._plane.layers(self._image_id):
            for command in layer.dockerfile_commands:
                if command.startswith("ENV "):
                    name, _, value = command.removeprefix("ENV ").partition("=")
                    from_deploy[name] = value.strip("'\"")
        for secret_id in self._function.secret_ids:
            from_deploy |= self._plane.variables(secret_id)
        packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        hub = os.environ.get("HF_ENDPOINT", "")
        environment = {
            **{name: os.environ[name] for name in KEPT if name in os.environ},
            **{name: self._local(value) for name, value in from_deploy.items()},
            "HOME": str(self.folder / "home"),
            "HF_ENDPOINT": hub if is_loopback(hub) else "http://127.0.0.1:9",
            "PYTHONPATH": os.pathsep.join([str(self._mounted[HOME]), *sorted(packages)]),
            "MODAL_SERVER_URL": f"http://127.0.0.1:{self._plane.port}",
            "MODAL_CONTAINER_ARGUMENTS_PATH": str(self.folder / "arguments"),
            "MODAL_CONFIG_PATH": os.devnull,
            "MODAL_IS_REMOTE": "1",
            "MODAL_TASK_ID": self.folder.name,
            "MODAL_IMAGE_ID": self._image_id,
            "MODAL_HEARTBEAT_INTERVAL": "1",
            "MODAL_RESTORE_STATE_PATH": str(self.folder / "restore.json"),
        }
        if self._function.checkpointing_enabled:
            environment["MODAL_ENABLE_SNAP_RESTORE"] = "1"
        if "SERVE_THREADS" in environment:  # as many as the cores that were asked for, and this machine has fewer
            environment["SERVE_THREADS"] = str(min(int(environment["SERVE_THREADS"]), os.cpu_count() or 1))
        if self._function.is_server:
            environment |= {"SERVE_HOST": "127.0.0.1", "SERVE_PORT": str(self.port)}
        return environment | self._extra

    def _arguments(self) -> pb.ContainerArguments:
        plane, function = self._plane, self._function
        # Set by Modal's worker, not by the client.
        function.is_checkpointing_function = function.checkpointing_enabled
        published = plane.published or pb.AppPublishRequest(function_ids={function.function_name: self._function_id})
        functions, classes = dict(published.function_ids), dict(published.class_ids)
        objects = [pb.Object(object_id=key, function_handle_metadata=plane.metadata[key]) for key in functions.values()]
        objects += [
            pb.Object(object_id=key, class_handle_metadata=pb.ClassHandleMetadata()) for key in classes.values()
        ]
        for dependency in function.object_dependencies:
            is_volume = dependency.object_id in plane.volumes
            metadata = pb.VolumeMetadata() if is_volume else None
            objects.append(pb.Object(object_id=dependency.object_id, volume_metadata=metadata))
        return pb.ContainerArguments(
            task_id=self.folder.name,
            function_id=self._function_id,
            app_id="ap-1",
            function_def=function,
            environment_name="main",
            checkpoint_id="ch-1" if function.checkpointing_enabled else "",
            app_layout=pb.AppLayout(function_ids=functions, class_ids=classes, objects=objects),
        )

    def _checkpoint(self) -> None:
        """Note what a snapshot would hold of the Volumes, and let the container go on as if restored."""
        process = Path(f"/proc/{self.process.pid}")
        if process.exists():
            links = [os.path.realpath(link) for link in (process / "fd").iterdir()]
            maps = (process / "maps").read_text(encoding="utf-8", errors="replace").splitlines()
            volumes = [str(local) for remote, local in self._mounted.items() if remote != HOME]
            self.held_at_checkpoint = [line for line in links + maps if any(volume in line for volume in volumes)]
        (self.folder / "restore.json").write_text("{}", encoding="utf-8")


def is_loopback(url: str) -> bool:
    """Whether an address stays on this machine."""
    return url.startswith(("http://127.0.0.1:", "http://localhost:"))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]
