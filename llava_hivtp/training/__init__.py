"""LLaVA's own trainer on pruned inputs: `python -m llava_hivtp.training`.

It runs on transformers 4.37.2 only, LLaVA's own pin: `llava.train` imports a name of
`transformers.trainer` that later releases do not have.
"""
