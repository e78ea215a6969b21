"""The training logs as one picture."""

import json
from pathlib import Path

_TOWER = {
    "color": "color", "shape": "shape", "character": "character",
    "place": "its place in the text", "number": "how many alike", "target": "arrow's target",
}  # fmt: skip


def draw_curves(logs: dict[str, Path], out: Path) -> Path:
    """One panel per stage: what share of words (tower) or of answers (language) is right."""
    import matplotlib

    matplotlib.use("svg" if out.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(logs), figsize=(5.2 * len(logs), 4.2), squeeze=False)
    for axis, (stage, file) in zip(axes[0], logs.items(), strict=True):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for name, title in _curves(stage, lines).items():
            points = [(x["minutes"], x[name]) for x in lines if name in x]
            axis.plot(*zip(*points, strict=True), label=title, linewidth=1.3)
        axis.set(title=stage, xlabel="minutes", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=2 if stage == "tower" else 3, loc="lower right")
    axes[0][0].set_ylabel("share right (tower: training stream, others: held-out)")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
    return out


def _curves(stage: str, lines: list[dict[str, float]]) -> dict[str, str]:
    if stage == "tower":
        return _TOWER
    names = sorted({name for line in lines for name in line} - {"step", "minutes", "loss"})
    return {name: name.replace("_", " ") for name in names}
