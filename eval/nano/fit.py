"""One training loop for both stages: by steps, logged, and resumed to the bit after a kill."""

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

_LOG_EVERY = 50
_SAVE_EVERY = 200

Step = Callable[[int], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Schedule:
    """Warm up, stay, then fall along a cosine to 2 % of the peak."""

    steps: int
    peak: float
    warm: int = 60
    flat: float = 0.4  # share of the steps before the rate falls

    def rate(self, step: int) -> float:
        done = step / self.steps
        fall = max(0.0, (done - self.flat) / (1 - self.flat))
        return self.peak * min(1, (step + 1) / self.warm) * (0.51 + 0.49 * math.cos(math.pi * fall))


def fit(
    folder: Path,
    stage: str,
    module: nn.Module,
    schedule: Schedule,
    step: Step,
    check: Callable[[], dict[str, float]] | None = None,
    check_every: int = 500,
) -> None:
    """Train `module` in place; whatever a step draws must depend on the step's number alone."""
    folder.mkdir(parents=True, exist_ok=True)
    state_file, log_file = folder / f"{stage}.pt", folder / f"{stage}.jsonl"
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0, weight_decay=0.02, betas=(0.9, 0.98))
    start, seconds = _resume(state_file, module, optimizer)
    _trim(log_file, start)
    sums: dict[str, list[float]] = defaultdict(list)
    began = time.monotonic() - seconds
    module.train()
    for number in tqdm(range(start, schedule.steps), stage, schedule.steps, initial=start):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(number)
        loss, scores = step(number)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for name, value in {"loss": loss.item(), **scores}.items():
            sums[name].append(value)
        done = number + 1
        if done % _LOG_EVERY == 0 or done == schedule.steps:
            line = {"step": done, "minutes": round((time.monotonic() - began) / 60, 2)}
            line |= {k: round(sum(v) / len(v), 4) for k, v in sums.items()}
            if check and (done % check_every == 0 or done == schedule.steps):
                line |= check()
            with log_file.open("a") as log:
                log.write(json.dumps(line) + "\n")
            sums.clear()
        if done % _SAVE_EVERY == 0 or done == schedule.steps:
            _save(state_file, done, time.monotonic() - began, module, optimizer)


def low_precision() -> torch.autocast:
    """Products in bfloat16 where an x86 CPU has instructions for it; without, it is much slower."""
    cpu = torch.cpu.get_capabilities()
    return torch.autocast("cpu", torch.bfloat16, any(map(cpu.get, ("avx512_bf16", "amx_bf16"))))


def restore(folder: Path, stage: str, module: nn.Module, steps: int) -> bool:
    """Load a stage whose last step is on disk, without what only training needs."""
    file = folder / f"{stage}.pt"
    state = torch.load(file, weights_only=True) if file.is_file() else {"step": -1}
    if state["step"] < steps:
        return False
    module.load_state_dict(state["module"])
    return True


def _resume(file: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    if not file.is_file():
        return 0, 0.0
    state = torch.load(file, weights_only=True)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def _save(
    file: Path, step: int, seconds: float, module: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write beside the file, then rename: a kill leaves the old state or the new one."""
    state = {
        "step": step,
        "seconds": seconds,
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    fresh = file.with_suffix(".tmp")
    torch.save(state, fresh)
    os.replace(fresh, file)


def _trim(log: Path, step: int) -> None:
    """Forget lines about steps that a resumed run will take again."""
    if log.is_file():
        lines = log.read_text().splitlines()
        kept = [x for x in lines if json.loads(x)["step"] <= step]
        log.write_text("".join(x + "\n" for x in kept))
