"""`vllm serve` as a user types it: chat by HTTP, and sixty-four requests at a time."""

from __future__ import annotations

import base64
import io
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_answers import HIVTP

QUESTION = "What is it?"
NEW = 8


class Server:
    """A running server and how to ask it."""

    def __init__(self, process, port, model):
        self.process, self.url, self.model = process, f"http://127.0.0.1:{port}", model

    def open(self, path, body=None):
        request = urllib.request.Request(self.url + path)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        return urllib.request.urlopen(request, timeout=300)

    def body(self, image=None, **given):
        parts = [{"type": "text", "text": QUESTION}]
        if image is not None:
            png = io.BytesIO()
            image.save(png, "PNG")
            url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
            parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
        messages = [{"role": "user", "content": parts}]
        fixed = {"model": self.model, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        fixed |= {"logprobs": True, "return_tokens_as_token_ids": True}  # random bytes are no text
        return {**fixed, "messages": messages, **given}

    def ask(self, image=None):
        """(prompt tokens, the answer's)."""
        with self.open("/v1/chat/completions", self.body(image)) as reply:
            answer = json.load(reply)
        told = answer["choices"][0]["logprobs"]["content"]
        tokens = [int(each["token"].removeprefix("token_id:")) for each in told]
        return answer["usage"]["prompt_tokens"], tokens

    def cancel(self, image):
        """Ask for a long answer and hang up after its first piece."""
        body = self.body(image, stream=True, max_tokens=400)
        with self.open("/v1/chat/completions", body) as reply:
            reply.readline()

    def metric(self, name):
        """Sum of a gauge or counter of Prometheus."""
        with self.open("/metrics") as reply:
            lines = reply.read().decode().splitlines()
        found = [line for line in lines if line.startswith(name) and line[len(name)] in " {"]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def memory(self):
        """Resident bytes of the server and all its children."""
        parents = {}
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            except (FileNotFoundError, ProcessLookupError):
                continue
            rss = int(fields.get("VmRSS", "0 kB").split()[0]) * 1024
            parents[int(fields["Pid"])] = int(fields["PPid"]), rss
        total = 0
        for pid, (_, rss) in parents.items():
            while pid in parents and pid != self.process.pid:
                pid = parents[pid][0]
            total += rss if pid == self.process.pid else 0
        return total


@contextmanager
def serve(folder, command, log, hivtp):
    """`vllm serve FOLDER`, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    arguments += ["--max-model-len", "1024", "--enforce-eager", "--block-size", "32"]
    arguments += ["--kv-cache-memory-bytes", str(1 << 26), "--max-num-seqs", "16"]
    arguments += ["--hf-overrides", json.dumps({"hivtp": hivtp})]
    with log.open("w") as out:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("vllm"), "serve", folder, *arguments],
            env=command,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    server = Server(process, port, folder)
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                server.open("/health").close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def server(checkpoint, command, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with serve(checkpoint("v15"), command, log, HIVTP) as running:
        yield running


@pytest.fixture(scope="module")
def expected(checkpoint, pictures):
    """(prompt tokens, the answer's) of every picture by transformers."""
    from reference import Reference

    reference = Reference(checkpoint("v15"), HIVTP)
    prompt = f"USER: <image>\n{QUESTION} ASSISTANT:"
    return [reference.ask(prompt, [picture], bos=False)[:2] for picture in pictures]


def test_a_chat_by_http_counts_the_kept_tokens_only(server, pictures, expected):
    text, _ = server.ask()
    for picture, wanted in zip(pictures, expected, strict=True):
        assert server.ask(picture) == wanted
        # The chat template writes "<image>" and a line break more than the text alone has.
        assert wanted[0] == text + 1 + 8


def test_sixty_four_requests_at_a_time_some_cancelled(server, pictures, expected):
    """Right answers, nobody's request lost, KV cache and memory given back, engine alive."""
    lock, wrong = threading.Lock(), []

    def one(i):
        picture = pictures[i % len(pictures)]
        if i % 4 == 3:
            return server.cancel(picture)
        found = server.ask(picture)
        if found != expected[i % len(pictures)]:
            with lock:
                wrong.append((i, found))
        return found

    with ThreadPoolExecutor(64) as pool:
        for _ in range(3):  # until allocators have what they want
            list(pool.map(one, range(128)))
        before, start = server.memory(), time.monotonic()
        for _ in range(3):
            list(pool.map(one, range(128)))
        seconds = time.monotonic() - start
    assert not wrong
    for _ in range(100):
        if not server.metric("vllm:num_requests_running"):
            break
        time.sleep(0.1)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:num_requests_waiting") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    grown = server.memory() - before
    print(f"384 requests, 96 of them cancelled: {seconds:.1f} s, {grown / 2**20:+.1f} MiB")
    assert grown < 64 * 2**20
    assert server.ask(pictures[0]) == expected[0]
