"""LLaVA's trainer, entered through the names that it looks up, with a model that prunes."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers.trainer
from torch import Tensor, nn
from transformers import CLIPVisionModel, Trainer, TrainerCallback
from transformers.integrations.deepspeed import deepspeed_load_checkpoint as load_spread

try:
    from llava.train import train as official
except ImportError as error:
    raise ImportError(
        f"LLaVA's trainer cannot be imported ({error}); it needs transformers 4.37.2: "
        "make setup TRANSFORMERS=4.37.2, then .venv-4.37.2/bin/python"
    ) from error
from llava.model.language_model.llava_llama import LlavaConfig
from llava.train.llava_trainer import LLaVATrainer

from llava_hivtp.families import attach
from llava_hivtp.loading import TRAINED_WITH, local_tower
from llava_hivtp.model import PrunedLlava, PrunedLlavaLlamaForCausalLM
from llava_hivtp.pruners import Pruner, for_depth
from llava_hivtp.training.merge import PROJECTOR, REST
from llava_hivtp.training.samples import checked_data
from llava_hivtp.zero3 import nothing_compiled


def train(name: str, pruners: Sequence[Pruner], attention: str | None = None) -> None:
    """Run `llava.train.train` on `sys.argv`; a model of its kind prunes while it learns.

    Args:
        name: of the method, written into the config of what is trained.
        pruners: the method; of several, each step draws one.
        attention: of the language model, as transformers names them; None for its default.

    Raises:
        FileNotFoundError, ValueError: for a bad argument or sample, before the first step.
        ImportError: for --deepspeed without DeepSpeed.
    """
    names = {
        "LlavaLlamaForCausalLM": SimpleNamespace(from_pretrained=_load),
        "make_supervised_data_module": checked_data,
        "maybe_zero_3": partial(_whole, official.maybe_zero_3),
        "LLaVATrainer": partial(PrunedTrainer, name=name, pruners=pruners),
    }
    spread = any(word.partition("=")[0] == "--deepspeed" for word in sys.argv)
    with _standing_in(official, names), nothing_compiled() if spread else nullcontext():
        official.train(attn_implementation=attention)


def _load(path: str, *args: Any, **options: Any) -> PrunedLlavaLlamaForCausalLM:
    """The model as the trainer asks for it; a tower inside the checkpoint's folder is found."""
    config = LlavaConfig.from_pretrained(path, cache_dir=options.get("cache_dir"))
    if hasattr(config, "mm_vision_tower"):
        config.mm_vision_tower = local_tower(path, config.mm_vision_tower)
    return PrunedLlavaLlamaForCausalLM.from_pretrained(path, *args, config=config, **options)


class PrunedTrainer(LLaVATrainer):
    """LLaVA's trainer with a method for every step, and checkpoints that training goes on from.

    LLaVA's own checkpoints lack the optimizer when the projector is tuned alone, and the projector
    when LoRA is.
    """

    def __init__(
        self, model: nn.Module, args: Any, name: str, pruners: Sequence[Pruner], **options: Any
    ) -> None:
        """Prepare the model; the vision tower is there by now.

        Raises:
            ValueError: if a method does not fit the tower, or one process would use several GPUs.
        """
        if args.n_gpu > 1:
            raise ValueError(f"{args.n_gpu} GPUs in one process: start one per GPU with torchrun")
        pruned = next(module for module in model.modules() if isinstance(module, PrunedLlava))
        if args.device.type == "cpu" and not args.bf16:
            _tower_in_float32(pruned)
        # Reentrant checkpoints, the default, cannot be spread over processes without DeepSpeed.
        args.gradient_checkpointing_kwargs = {"use_reentrant": False}
        depth = pruned.tower_of(pruned).layers
        pruners = [for_depth(pruner, depth) for pruner in pruners]
        for pruner in reversed(pruners):
            attach(pruned, pruner)
        arguments = [asdict(pruner) for pruner in pruners]
        setattr(pruned.config, TRAINED_WITH, {"pruner": name, "arguments": arguments})
        super().__init__(
            model=model, args=args, callbacks=[EveryStep(pruned, pruners, args.seed)], **options
        )
        if args.deepspeed and not self.is_deepspeed_enabled:
            raise ValueError(
                "accelerate leaves out --deepspeed under --use_cpu and ACCELERATE_USE_CPU: hide "
                "the GPUs instead, CUDA_VISIBLE_DEVICES="
            )

    def train(self, *args: Any, **options: Any) -> Any:
        """As transformers', whose errors are none of the arguments' or the data's any more."""
        lenient = {"deepspeed_load_checkpoint": partial(_resume, load_spread)}
        try:
            with _standing_in(transformers.trainer, lenient):
                return super().train(*args, **options)
        except Exception as error:
            raise RuntimeError(f"training stopped at step {self.state.global_step}") from error

    def create_optimizer(self) -> Any:
        """LLaVA's, without groups of no weights, which DeepSpeed drops and a schedule counts."""
        optimizer = super().create_optimizer()
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _save_checkpoint(self, model: nn.Module, trial: Any, metrics: Any = None) -> None:
        Trainer._save_checkpoint(self, model, trial, metrics)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:  # which would write the whole model every time
            engine = self.model_wrapped
            save = partial(type(engine).save_checkpoint, engine, exclude_frozen_parameters=True)
            engine.save_checkpoint = save
        super()._save_optimizer_and_scheduler(output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what was trained; all of the model if all of it was."""
        trained = self._trained()
        if trained is None:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = output_dir or self.args.output_dir
            os.makedirs(folder, exist_ok=True)
            self.model.config.save_pretrained(folder)
            if self.args.lora_enable:
                lora = {key: weight for key, weight in trained.items() if "lora_" in key}
                self.model.save_pretrained(folder, state_dict=lora)
                rest = {key: weight for key, weight in trained.items() if key not in lora}
                torch.save(rest, os.path.join(folder, REST))
            else:
                torch.save(trained, os.path.join(folder, PROJECTOR))

    def _trained(self) -> dict[str, Tensor] | None:
        """The weights that are trained, gathered from all processes; None for the whole model."""
        named = list(self.model.named_parameters())
        if self.args.lora_enable:
            lora = official.get_peft_state_maybe_zero_3(named, self.args.lora_bias)
            return lora | official.get_peft_state_non_lora_maybe_zero_3(named)
        if self.args.tune_mm_mlp_adapter:
            return official.get_mm_adapter_state_maybe_zero_3(named, ["mm_projector"])
        return None

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        if self.args.tune_mm_mlp_adapter:
            _fill(target, os.path.join(checkpoint, PROJECTOR))
            return
        super()._load_from_checkpoint(checkpoint, model)
        if self.args.lora_enable:
            _fill(target, os.path.join(checkpoint, REST))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # numpy's state is an array, which newer PyTorch reads from a file only if told so.
        state = np.random.get_state()[1]
        kinds = [np.core.multiarray._reconstruct, np.ndarray, np.dtype, type(state.dtype)]
        with torch.serialization.safe_globals(kinds):
            super()._load_rng_state(checkpoint)


class EveryStep(TrainerCallback):
    """Draws the method of a step, and lets a seeded one draw anew in every epoch.

    Both depend on the step alone: on all processes alike, and the same after a resumption.
    """

    def __init__(self, model: PrunedLlava, pruners: Sequence[Pruner], seed: int) -> None:
        self.model, self.pruners, self.seed = model, pruners, seed

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Set the method of the step that begins."""
        pruner = random.Random(f"{self.seed} {state.global_step}").choice(self.pruners)
        if pruner.seeded and hasattr(pruner, "seed"):
            pruner = replace(pruner, seed=pruner.seed + int(state.epoch or 0))
        self.model.pruner = pruner


def _fill(model: nn.Module, path: str) -> None:
    """Load some of a model's weights, all of which it must have."""
    found = model.load_state_dict(torch.load(path, map_location="cpu"), strict=False)
    if found.unexpected_keys:
        raise ValueError(f"{path} holds weights that the model lacks: {found.unexpected_keys}")


def _whole(gather: Callable[..., Tensor], weight: Tensor, **options: Any) -> Tensor:
    """A weight on the CPU; LLaVA's `gather` needs DeepSpeed even where nothing is spread."""
    if hasattr(weight, "ds_id"):
        return gather(weight, **options)
    return weight.detach().cpu().clone()


def _resume(load: Callable[..., None], engine: Any, checkpoint: str) -> None:
    """Go on under DeepSpeed; frozen weights are the base's and not in the checkpoint."""
    engine.load_checkpoint = partial(engine.load_checkpoint, load_module_strict=False)
    load(engine, checkpoint)


def _tower_in_float32(model: PrunedLlava) -> None:
    """Read the tower's weights again: off a GPU, too, the trainer has rounded them to float16."""
    tower = model.get_vision_tower()
    whole = CLIPVisionModel.from_pretrained(tower.vision_tower_name, torch_dtype=torch.float32)
    tower.vision_tower = whole.requires_grad_(False)


@contextmanager
def _standing_in(module: Any, names: dict[str, Any]) -> Iterator[None]:
    """Let a module find other things behind some of its names for a while."""
    before = {name: getattr(module, name) for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(before)
