"""A server of vLLM in its own environment, spoken to over loopback HTTP: `vllm serve`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAIT = 30  # seconds in which a server that was told to end has to
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class EngineError(OSError):
    """The engine ended before it was told to, or cannot be what it should be."""


class EngineNotStarted(EngineError):
    """The engine ended before it was ready: no unit's fault."""


@dataclass(frozen=True)
class Engine:
    """Where vLLM is, and what it is told besides what an evaluation tells it."""

    environment: Path  # a virtual environment, as `make setup-vllm` makes it
    arguments: tuple[str, ...] = ()  # further ones of `vllm serve`

    @property
    def missing(self) -> str | None:
        """Why there is no engine, if there is none."""
        if (self.environment / "bin" / "vllm").is_file():
            return None
        return f"no vLLM in {self.environment}: `make setup-vllm`, or name another --engine-env"

    def version(self) -> str:
        """Name and version, for the protocol of a result."""
        code = "from importlib.metadata import version; print(version('vllm'))"
        command = [self.environment / "bin" / "python", "-c", code]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise EngineError(f"no vLLM in {self.environment}: {run.stderr.strip()[-200:]}")
        return f"vLLM {run.stdout.strip()}"


class Server:
    """One checkpoint under one method; ready when it is made, ended by `close`."""

    def __init__(self, engine: Engine, model: str, arguments: Sequence[str]) -> None:
        """Start `vllm serve` and wait until it answers.

        Raises:
            EngineNotStarted: if it ends instead, with its last words.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        place = ["--host", "127.0.0.1", "--port", str(self.port)]
        # Should this process be killed, the server ends, too.
        guard = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        self._process = subprocess.Popen(
            [*guard, str(engine.environment / "bin" / "vllm"), "serve", model, *place]
            + [*arguments, *engine.arguments],
            env=_environment(engine),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us, who then end it
        )
        try:
            while not self._healthy():
                if self.ended:
                    raise EngineNotStarted(self._end())
                time.sleep(0.2)
        except BaseException:
            self.close()
            raise

    @property
    def ended(self) -> bool:
        """Whether it runs no more."""
        return self._process.poll() is not None

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request.

        Raises:
            ValueError: if it is refused, with what the server says.
            EngineError: if the server has ended.
        """
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:400]
            if error.code >= 500:
                self._check()
            raise ValueError(f"vLLM answers {error.code} to a request: {said}") from error
        except (OSError, ValueError) as error:  # cut off, or cut short
            self._check()
            raise EngineError(f"vLLM cannot be spoken to: {error}") from error

    def close(self) -> None:
        """End the server and what it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(WAIT)
        self._log.close()

    def _healthy(self) -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
        except OSError:  # not yet
            return False
        return True

    def _check(self) -> None:
        """Raise an EngineError if the server has ended, or does within seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
            raise EngineError(self._end())

    def _end(self) -> str:
        return f"vLLM ended with status {self._process.returncode}; {self._last_words()}"

    def _last_words(self) -> str:
        """The last error in the log, else its last lines."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        errors = [line for line in lines if "Error: " in line and " WARNING " not in line]
        said = errors[0] if errors else " / ".join(lines[-3:])
        return f"its log says: {said[-400:]}"


def _environment(engine: Engine) -> dict[str, str]:
    """Of this process, less what torchrun told it; one GPU of its own under torchrun."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment["PATH"] = f"{engine.environment / 'bin'}{os.pathsep}{environment.get('PATH', '')}"
    if rank := os.environ.get("LOCAL_RANK"):
        given = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        environment["CUDA_VISIBLE_DEVICES"] = given[int(rank)] if given else rank
    return environment
