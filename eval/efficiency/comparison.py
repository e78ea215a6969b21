"""A measured case beside another one, and the verdict on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eval.clock import Spread, ratios
from eval.efficiency.cases import Case
from eval.efficiency.ideal import Ceilings, RequestSizes, Stages, request_seconds, stages
from eval.efficiency.stopwatch import STAGES, Run
from eval.untrained.shapes import Shape

UNTOUCHED = ("tower", "splice", "first")  # stages whose work does not depend on the tokens kept
NO_GAIN = 0.98  # a median TTFT ratio above it is no gain
TOLERANCE = 1.10  # measured over ideal: beyond it, something holds the gain back


@dataclass(frozen=True)
class Setting:
    """What all cases of a comparison share."""

    model: str
    shape: Shape
    dtype: str
    itemsize: int
    size: tuple[int, int]  # of the image, (width, height)
    text: int
    ceilings: Ceilings
    worked_share: float = 1.0  # of a CPU, of the seconds timed: `eval.clock.Watch`
    warnings: tuple[str, ...] = ()  # what makes the times doubtful


@dataclass(frozen=True)
class Result:
    """One case of one setting, measured."""

    setting: Setting
    case: Case
    runs: tuple[Run, ...]
    request: RequestSizes
    peak: int  # bytes beyond the weights
    flops: int  # as torch counts them, up to the first token

    @property
    def image_tokens(self) -> float:
        """Positions an image takes in a layer of the language model, newlines included, on average.

        Layers cache what they read.
        """
        layers = self.setting.shape.layers
        return self.request.total(layers) / layers - self.setting.text

    @property
    def ttft(self) -> Spread:
        """Seconds to the first token."""
        return Spread.of(run.ttft for run in self.runs)

    @property
    def work(self) -> Stages:
        """Closed forms up to the first token."""
        return stages(self.setting.shape, self.request, self.setting.itemsize)

    def stage(self, name: str) -> Spread:
        """Seconds of one stage."""
        return Spread.of(run.stages[name] for run in self.runs)

    def throughput(self, new_tokens: int) -> Spread:
        """Tokens per second over a whole request of `new_tokens`."""
        batch = self.request.batch
        return Spread.of(run.throughput(new_tokens, batch) for run in self.runs)

    def ideal_seconds(self, new_tokens: int = 1) -> float:
        """Least time of a request of `new_tokens`, at the device's ceilings."""
        setting = self.setting
        return request_seconds(
            setting.shape, self.request, setting.itemsize, setting.ceilings, new_tokens
        )


@dataclass(frozen=True)
class Comparison:
    """A case against a base measured in the same rounds."""

    result: Result
    base: Result

    @property
    def ttft(self) -> Spread:
        """TTFT over the base's, paired round by round."""
        return ratios((r.ttft for r in self.result.runs), (r.ttft for r in self.base.runs))

    @property
    def ideal_ttft(self) -> float:
        """What physics allows."""
        return self.result.ideal_seconds() / self.base.ideal_seconds()

    def throughput(self, new_tokens: int) -> Spread:
        """Throughput over the base's."""
        batch = self.result.request.batch
        return ratios(
            (run.throughput(new_tokens, batch) for run in self.result.runs),
            (run.throughput(new_tokens, batch) for run in self.base.runs),
        )

    def ideal_throughput(self, new_tokens: int) -> float:
        """What physics allows."""
        return self.base.ideal_seconds(new_tokens) / self.result.ideal_seconds(new_tokens)

    @property
    def decode(self) -> Spread:
        """Tokens per second after the first, over the base's."""
        return ratios(
            (run.per_token() for run in self.base.runs),
            (run.per_token() for run in self.result.runs),
        )

    def ideal_decode(self, new_tokens: int) -> float:
        """What physics allows, for an answer of `new_tokens`."""
        ours, theirs = (
            result.ideal_seconds(new_tokens) - result.ideal_seconds()
            for result in (self.result, self.base)
        )
        return theirs / ours

    @property
    def select_share(self) -> Spread:
        """Score and selection over the base's TTFT."""
        return ratios(
            (run.stages["select"] for run in self.result.runs),
            (run.ttft for run in self.base.runs),
        )

    def verdict(self) -> str:
        """Aloud: does pruning gain, and if less than it could, which stage is to blame."""
        ttft, ideal = self.ttft, self.ideal_ttft
        said = f"{self.result.case.label}: TTFT {ttft.median:.2f} of {self.base.case.label}'s"
        if ttft.median > NO_GAIN:
            return f"PRUNING GAINS NOTHING. {said}. {self._blame()}"
        if ttft.high >= 1:
            return (
                f"{said}, but its quartiles reach from {ttft.low:.2f} to {ttft.high:.2f}: "
                "UNDECIDED, measure more rounds or on a quieter machine."
            )
        if ttft.median > TOLERANCE * ideal:
            return f"{said}, ideal {ideal:.2f}. {self._blame()}"
        return f"{said}, ideal {ideal:.2f}."

    def _blame(self) -> str:
        """The stage that costs most beyond its share of the work."""
        excess = {name: self._excess(name) for name in STAGES}
        worst = max(excess, key=excess.__getitem__)
        base_ttft = self.base.ttft.median
        if self.ideal_ttft > TOLERANCE**-1:
            share = sum(self.base.stage(name).median for name in UNTOUCHED) / base_ttft
            return (
                f"No more can be had: {share:.0%} of the base's time is tower, splice and choosing "
                f"a token, which no pruning shortens, and {self.result.image_tokens:g} of "
                f"{self.base.image_tokens:g} tokens stay."
            )
        if worst == "select":
            return (
                f"To blame: select, {1e3 * self.result.stage('select').median:.1f} ms, "
                f"{self.result.stage('select').median / base_ttft:.1%} of the base's TTFT."
            )
        ours, theirs = self.result.stage(worst).median, self.base.stage(worst).median
        return (
            f"To blame: {worst}, {1e3 * ours:.1f} ms against the base's {1e3 * theirs:.1f} ms, "
            f"where its work is {self._work_ratio(worst):.2f} of the base's."
        )

    def _excess(self, name: str) -> float:
        """Seconds a stage takes beyond the base's time scaled by its work."""
        ours, theirs = self.result.stage(name).median, self.base.stage(name).median
        return ours - theirs * self._work_ratio(name)

    def _work_ratio(self, name: str) -> float:
        if name not in ("tower", "project", "prefill"):
            return 1.0
        ceilings = self.result.setting.ceilings
        ours, theirs = (getattr(result.work, name) for result in (self.result, self.base))
        return ours.seconds(ceilings) / theirs.seconds(ceilings)


def differences(results: Sequence[Result]) -> list[str]:
    """HIVTP's TTFT against every other method of its block; called where quartiles are apart."""
    said = []
    for ours in results:
        if not ours.case.is_hivtp:
            continue
        rivals = [
            other
            for other in results
            if other.case.block == ours.case.block
            and other.case.layout == ours.case.layout
            and other is not ours
            and other.case.pruner is not None
        ]
        for other in rivals:
            ratio = Comparison(ours, other).ttft
            word = "no difference"
            if ours.ttft.apart(other.ttft):
                word = "earlier" if ours.ttft.median < other.ttft.median else "later"
            said.append(
                f"{ours.case.label} against {other.case.label}: {word} (TTFT "
                f"{ratio.median:.3f}, quartiles {ratio.low:.3f} to {ratio.high:.3f})"
            )
    return said


def unpruned(results: Iterable[Result], layout: str) -> Result:
    """The case `none` of a layout: everything kept, through our own path."""
    return next(r for r in results if r.case.name == "none" and r.case.layout == layout)


def stock_of(results: Iterable[Result]) -> Result:
    """The case of stock LLaVA."""
    return next(result for result in results if result.case.pruner is None)
