"""Files of the emulated account: uploaded contents by their hash, and Volumes as folders.  They go when it ends."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from modal_proto import api_pb2 as pb


class Store:
    """Contents by SHA-256, uploads by id, Volumes by id, all below ``home``."""

    def __init__(self, home: Path) -> None:
        self._contents = home / "contents"
        self._uploads = home / "uploads"
        self._volumes = home / "volumes"
        for folder in (self._contents, self._uploads, self._volumes):
            folder.mkdir(parents=True)

    def has(self, sha256_hex: str) -> bool:
        """Whether these contents are here."""
        return self.content(sha256_hex).exists()

    def content(self, sha256_hex: str) -> Path:
        """Where these contents lie."""
        return self._contents / sha256_hex

    def put(self, sha256_hex: str, data: bytes) -> None:
        """Keep contents that came inline."""
        if hashlib.sha256(data).hexdigest() != sha256_hex:
            raise ValueError("the contents do not have the hash that the client says")
        self.content(sha256_hex).write_bytes(data)

    def upload(self, upload_id: str) -> Path:
        """Where a large file is written while it arrives."""
        return self._uploads / upload_id

    def adopt(self, sha256_hex: str, upload_id: str) -> None:
        """Keep contents that came as an upload."""
        with self.upload(upload_id).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256_hex:
                raise ValueError("the upload does not have the hash that the client says")
        self.upload(upload_id).rename(self.content(sha256_hex))

    def volume(self, volume_id: str) -> Path:
        """A Volume's folder."""
        folder = self._volumes / volume_id
        folder.mkdir(exist_ok=True)
        return folder

    def put_files(self, volume_id: str, files: Iterable[pb.MountFile]) -> None:
        """Make uploaded contents appear in a Volume."""
        self.lay_out(self.volume(volume_id), files)

    def lay_out(self, root: Path, files: Iterable[pb.MountFile]) -> None:
        """Files at their paths below ``root``, as links to their contents where the disk allows."""
        for file in files:
            path = root / PurePosixPath(file.filename).relative_to("/" if file.filename.startswith("/") else ".")
            if ".." in path.parts:
                raise ValueError(f"{file.filename} leaves its folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            try:
                os.link(self.content(file.sha256_hex), path)
            except OSError:
                shutil.copyfile(self.content(file.sha256_hex), path)
