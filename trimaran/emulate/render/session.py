"""One life of a service under Render's rules: start, load, SIGTERM in mid-stream, and the next start."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx

from trimaran.emulate.render.instance import MB, Instance
from trimaran.emulate.render.rules import HEALTHY_S, Finding, Prober, judged
from trimaran.emulate.render.scene import DATA, Scene

POLL_S = 0.05
NUM_STREAMS = 4
LONG_TEXT = "Count on and on, and write every number as a word. " * 30


class Session:
    """Runs a scene.

    Args:
        scene: The service.
        folder: Empty; holds the file system and the log.
        say: Gets a line for each step.
    """

    def __init__(self, scene: Scene, folder: Path, say: Callable[[str], object]) -> None:
        self._scene, self._say = scene, say
        self._disk, self._log = folder / "disk", folder / "log"
        self._base = f"http://127.0.0.1:{scene.port}"
        headers = {"x-api-key": scene.key} if scene.key else {}
        self._client = httpx.Client(base_url=self._base, headers=headers, timeout=HEALTHY_S)
        self._peaks: list[Instance] = []

    def run(self) -> Iterator[Finding]:
        """The findings, each as soon as it is known; what cannot be known after a failure is left out."""
        self._make_disk()
        instance = self._start()
        prober = Prober(self._base + (self._scene.health_path or "/"))
        try:
            prober.start()
            began = time.monotonic()
            yield from self._first_start(instance, prober, began)
            if instance.is_running and prober.healthy_at is not None:
                self._say("Answering requests")
                yield self._answers()
                prober.stop()
                yield from prober.findings()
                self._say("A new deploy: SIGTERM in mid-stream")
                yield self._deploy(instance)
                yield self._again()
            yield self._memory()
        finally:
            prober.stop()
            for each in self._peaks:
                each.close()
            self._client.close()

    def _make_disk(self) -> None:
        for name in ("home", DATA.strip("/")):
            (self._disk / name).mkdir(parents=True, exist_ok=True)

    def _start(self) -> Instance:
        instance = Instance(self._scene, self._disk, self._log)
        self._peaks.append(instance)
        return instance

    def _first_start(self, instance: Instance, prober: Prober, began: float) -> Iterator[Finding]:
        self._say(f"Starting on port {self._scene.port}, plan {self._scene.plan.name}")
        bound = self._until(instance, self._is_bound)
        found = f"after {time.monotonic() - began:.1f} s" if bound else self._end_of(instance)
        yield judged(f"listens on PORT ({self._scene.port})", bound, found)
        if not bound:
            return
        healthy = self._until(instance, lambda: prober.healthy_at is not None)
        found = f"after {(prober.healthy_at or began) - began:.1f} s" if healthy else self._end_of(instance)
        yield judged("healthy within 15 min", healthy, found)
        if healthy:
            ready = self._until(instance, self._is_ready)
            found = f"model ready after {time.monotonic() - began:.1f} s" if ready else self._end_of(instance)
            yield judged("stays up until the model is ready", ready, found)

    def _until(self, instance: Instance, condition: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + HEALTHY_S
        while not condition():
            if not instance.is_running or time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def _is_bound(self) -> bool:
        try:
            self._client.get("/")
        except httpx.TransportError:
            return False
        return True

    def _is_ready(self) -> bool:
        try:
            return self._client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def _end_of(self, instance: Instance) -> str:
        if instance.is_over:
            return f"killed: it took more than the plan's {self._scene.plan.memory_mb} MB"
        status = instance.process.poll()
        return (
            f"still not after {HEALTHY_S:.0f} s" if status is None else f"ended with {status}: {instance.last_lines()}"
        )

    def _chat(self, text: str, num_tokens: int) -> dict[str, Any]:
        model = self._client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        return {
            "model": model, "messages": [{"role": "user", "content": text}], "max_tokens": num_tokens, "stream": True,
        }  # fmt: skip

    def _answers(self) -> Finding:
        """Several streams at once, so that the health checks meet a busy server."""
        ends: list[str] = []

        def ask() -> None:
            try:
                ends.append(self._client.post("/v1/chat/completions", json=body).text[-40:])
            except httpx.HTTPError as error:
                ends.append(type(error).__name__)

        try:
            body = self._chat("Name some rivers.", 64)
        except (httpx.HTTPError, KeyError, ValueError) as error:
            return judged("answers requests", False, f"{type(error).__name__}: {error}")
        threads = [threading.Thread(target=ask) for _ in range(NUM_STREAMS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        num_good = sum("[DONE]" in end for end in ends)
        return judged("answers requests", num_good == NUM_STREAMS, f"{num_good} of {NUM_STREAMS} streams are whole")

    def _deploy(self, instance: Instance) -> Finding:
        rule = f"drains within {self._scene.delay_s} s of SIGTERM"
        patience = threading.Timer(self._scene.delay_s, instance.process.kill)
        began, text = time.monotonic(), ""
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=self._chat(LONG_TEXT, 400)) as answer:
                for line in answer.iter_lines():
                    if not text:
                        began = time.monotonic()
                        instance.terminate()
                        patience.start()
                    text += line + "\n"
        except httpx.HTTPError as error:
            text += type(error).__name__
        status = instance.process.wait() if text else None
        took_s = time.monotonic() - began
        patience.cancel()
        instance.close()
        if status is None or took_s >= self._scene.delay_s:
            return judged(rule, False, f"killed after {took_s:.0f} s" if text else "no stream came")
        is_whole = "[DONE]" in text and '"error"' not in text
        stream = "the stream was whole" if is_whole else "a stream was cut off: SERVE_DRAIN_TIMEOUT_S is too short"
        return judged(rule, is_whole and status == 0, f"ended with {status} after {took_s:.1f} s; {stream}")

    def _again(self) -> Finding:
        """The next instance finds what a disk keeps, and nothing else."""
        num_bytes = sum(
            path.stat().st_size for path in self._disk.rglob("*") if path.is_file() and not path.is_symlink()
        )
        kept = self._scene.keeps_data
        for folder in self._disk.iterdir():
            if not (kept and folder.name == DATA.strip("/")):
                shutil.rmtree(folder, ignore_errors=True)
        self._make_disk()
        self._say("The next instance, on what the disk keeps" if kept else "The next instance, on an empty disk")
        began = time.monotonic()
        instance = self._start()
        ready = self._until(instance, self._is_ready)
        took = f"ready after {time.monotonic() - began:.1f} s" if ready else self._end_of(instance)
        if ready:
            instance.terminate()
            instance.wait(self._scene.delay_s)
        lost = "are kept by the disk" if kept else "are written anew at each start"
        return judged("starts again without its files", ready, f"{took}; {num_bytes / MB:.0f} MB {lost}")

    def _memory(self) -> Finding:
        plan = self._scene.plan
        peaks = [each.peak_bytes for each in self._peaks if each.peak_bytes is not None]
        is_over = any(each.is_over for each in self._peaks)
        if not peaks:
            return judged(f"stays within {plan.memory_mb} MB", None, "this system does not tell a process's memory")
        return judged(
            f"stays within {plan.memory_mb} MB", not is_over, f"peak {max(peaks) / MB:.0f} MB, mapped files aside"
        )
