"""Serve a pruned LLaVA with vLLM: a plug-in that vLLM finds by its entry point.

    vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides '{"hivtp": {"r": 2, "k": 25, "c": 2}}'

An image then costs only its kept tokens in the prompt, the prefill and the KV cache. Without the
key `hivtp` everything is vLLM's own. Made for the vLLM release that the extra `serve` pins.
"""

from __future__ import annotations

ARCHITECTURES = ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")


def register() -> None:
    """Entry point of `vllm.general_plugins`: name our classes for vLLM's two architectures.

    Runs in every process of vLLM; the classes are imported when a checkpoint needs them.
    """
    from vllm import ModelRegistry

    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"llava_hivtp.serving.models:Pruned{name}")
