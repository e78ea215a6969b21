"""What serving with vLLM gains; runs in the engine's environment, `.venv-vllm`."""
