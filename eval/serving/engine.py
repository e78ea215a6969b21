"""An engine of vLLM in a process of its own, and batches of requests it answers."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PROMPT = "USER: <image>\nWhat is in the picture? ASSISTANT:"


@dataclass(frozen=True)
class Load:
    """What an engine is asked, and what it may use."""

    folder: Path  # a checkpoint in transformers' format; its weights are made up where they lie
    requests: int  # in one batch
    new: int  # tokens of every answer
    dtype: str
    cache: int  # bytes of KV cache
    size: tuple[int, int]  # (width, height) of the images
    eager: bool  # nothing is compiled or recorded: a quick start, where launches cost nothing


@dataclass(frozen=True)
class Batch:
    """One batch of requests, each with a new image."""

    seconds: float
    cpu_seconds: float  # that the engine's process worked
    prompt: int  # tokens of a request, the image's included
    blocks: int  # of KV cache in the engine
    block: int  # tokens of a block
    cache: int  # bytes of KV cache


class Engine:
    """Starts at once, answers `run`, ends with `close`."""

    def __init__(self, load: Load, hivtp: dict[str, Any] | None, plug_in: bool = True) -> None:
        context = multiprocessing.get_context("spawn")  # vLLM does not survive a fork
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, load, hivtp, plug_in))
        self._process.start()
        end.close()
        self._pipe.recv()
        self._batches = 0

    def run(self) -> Batch:
        """Answer one batch."""
        self._pipe.send(self._batches)
        self._batches += 1
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()


def _serve(pipe: Connection, load: Load, hivtp: dict[str, Any] | None, plug_in: bool) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if not plug_in:
        os.environ["VLLM_PLUGINS"] = "none"
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(load.folder),
        load_format="dummy",
        enforce_eager=load.eager,
        dtype=load.dtype,
        max_model_len=4096,
        kv_cache_memory_bytes=load.cache,
        limit_mm_per_prompt={"image": 1},
        enable_prefix_caching=False,
        hf_overrides={} if hivtp is None else {"hivtp": hivtp},
    )
    cache = llm.llm_engine.vllm_config.cache_config
    sampling = SamplingParams(temperature=0, max_tokens=load.new, ignore_eos=True)
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        prompts = _prompts(load, number)
        began, worked = time.perf_counter(), time.process_time()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        worked, seconds = time.process_time() - worked, time.perf_counter() - began
        prompt = len(outputs[0].prompt_token_ids)
        blocks = cache.num_gpu_blocks
        pipe.send(Batch(seconds, worked, prompt, blocks, cache.block_size, load.cache))


def _prompts(load: Load, number: int) -> list[dict[str, Any]]:
    """Images differ between requests and batches, so no cache can answer."""
    import numpy as np
    from PIL import Image

    rng, (width, height) = np.random.default_rng(number), load.size
    pixels = rng.integers(0, 255, (load.requests, height, width, 3), np.uint8)
    return [
        {"prompt": PROMPT, "multi_modal_data": {"image": Image.fromarray(each)}} for each in pixels
    ]
