"""What a request costs in arithmetic and memory traffic, and the least time that can take.

Closed forms: multiplications and additions both count, a matrix product (m, k) x (k, n) is 2 m k n.
Attention counts whole squares, as `torch.utils.flop_counter` does, also where a causal mask empties
half of them. Norms, activations and softmax are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from eval.untrained.shapes import Shape


@dataclass(frozen=True)
class Ceilings:
    """What the device was measured to reach in the dtype of the weights."""

    flops: float  # per second, large matrix product
    bytes: float  # per second, streaming


@dataclass(frozen=True)
class Work:
    """Arithmetic and least memory traffic of one stage."""

    flops: float
    bytes: float

    def seconds(self, ceilings: Ceilings) -> float:
        """No device with these ceilings is faster."""
        return max(self.flops / ceilings.flops, self.bytes / ceilings.bytes)


@dataclass(frozen=True)
class RequestSizes:
    """Sizes of one request, or of a batch of equal ones."""

    batch: int
    tiles: int  # per image
    depth: int  # encoder layers that run
    projected: int  # tokens per image that pass the projector
    length: int  # positions of the prompt, image included, in the language model
    lengths: tuple[int, ...] = ()  # in each of its layers, where they differ

    def total(self, layers: int) -> int:
        """Positions summed over the layers."""
        return sum(self.lengths) if self.lengths else layers * self.length


@dataclass(frozen=True)
class Stages:
    """Work of the stages up to the first token."""

    tower: Work
    project: Work
    prefill: Work

    @property
    def flops(self) -> float:
        """Of all stages."""
        return sum(getattr(self, field.name).flops for field in fields(self))

    def seconds(self, ceilings: Ceilings) -> float:
        """Least time to the first token; choosing tokens is free."""
        return sum(getattr(self, field.name).seconds(ceilings) for field in fields(self))


def stages(shape: Shape, request: RequestSizes, itemsize: int) -> Stages:
    """Work up to the first token. `itemsize`: bytes per weight and per cached number."""
    return Stages(
        _tower(shape, request, itemsize),
        _project(shape, request, itemsize),
        _prefill(shape, request, itemsize),
    )


def decode(shape: Shape, request: RequestSizes, itemsize: int, step: int) -> Work:
    """Work of the `step`-th token after the first (from 1): every weight and cached key is read."""
    seen = request.total(shape.layers) + shape.layers * step
    per_layer = _lm_layer_weights(shape)
    flops = 2 * shape.layers * per_layer + 4 * shape.width * seen
    weights = shape.layers * per_layer + shape.width * shape.vocab
    flops = request.batch * (flops + 2 * shape.width * shape.vocab)
    return Work(flops, weights * itemsize + cache_bytes(shape, request, itemsize, step))


def cache_bytes(shape: Shape, request: RequestSizes, itemsize: int, generated: int = 0) -> int:
    """Keys and values of the prompt and of `generated` tokens."""
    positions = request.total(shape.layers) + shape.layers * generated
    return request.batch * positions * 2 * shape.kv_width * itemsize


def request_bytes(shape: Shape, request: RequestSizes, itemsize: int, generated: int) -> int:
    """Most memory of a batch beyond the weights: the cache, and the larger of tower and prefill.

    Of a layer, what one block keeps alive at once: input, residual, queries, keys, values and the
    output of attention, or the MLP's hidden numbers; besides, in the tower the pixels and what is
    tapped of four layers, in the prefill the embeddings and the logits of every position.
    """
    tower = shape.tower
    tile = (1 + tower.patches) * max(7 * tower.width, 3 * tower.width + 2 * tower.mlp)
    tile = (tile + 2 * 3 * tower.side**2) * itemsize + tap_bytes(shape, 4, itemsize)
    position = max(5 * shape.width + 2 * shape.kv_width, 3 * shape.width + 3 * shape.mlp)
    position = (position + shape.width + shape.vocab) * itemsize
    largest = max(request.tiles * tile, request.length * position)
    return request.batch * largest + cache_bytes(shape, request, itemsize, generated)


def request_seconds(
    shape: Shape, request: RequestSizes, itemsize: int, ceilings: Ceilings, new_tokens: int = 1
) -> float:
    """Least time of a request of `new_tokens`."""
    steps = (decode(shape, request, itemsize, step) for step in range(1, new_tokens))
    first = stages(shape, request, itemsize).seconds(ceilings)
    return first + sum(step.seconds(ceilings) for step in steps)


def gain_ends(
    shape: Shape,
    full: RequestSizes,
    pruned: RequestSizes,
    itemsize: int,
    ceilings: Ceilings,
    most: int,
    least: float = 1.1,
) -> int:
    """Longest answer, in tokens, whose throughput still gains `least`; `most` if all do."""
    ours = request_seconds(shape, pruned, itemsize, ceilings)
    theirs = request_seconds(shape, full, itemsize, ceilings)
    for length in range(1, most):
        if theirs < least * ours:
            return length - 1
        ours += decode(shape, pruned, itemsize, length).seconds(ceilings)
        theirs += decode(shape, full, itemsize, length).seconds(ceilings)
    return most


def score_flops(shape: Shape, tiles: int, layers: int) -> int:
    """Logits of the tapped layers: all that received attention multiplies."""
    return 2 * tiles * layers * (1 + shape.tower.patches) ** 2 * shape.tower.width


def tap_bytes(shape: Shape, layers: int, itemsize: int) -> int:
    """Stored queries and keys of one tile."""
    return 2 * layers * (1 + shape.tower.patches) * shape.tower.width * itemsize


def _tower(shape: Shape, request: RequestSizes, itemsize: int) -> Work:
    tower = shape.tower
    tokens = 1 + tower.patches
    embed = 3 * tower.patch**2 * tower.width
    weights = 4 * tower.width**2 + 2 * tower.width * tower.mlp
    layer = 2 * weights * tokens + 4 * tokens**2 * tower.width
    flops = request.batch * request.tiles * (2 * embed * tower.patches + request.depth * layer)
    return Work(flops, (embed + request.depth * weights) * itemsize)


def _project(shape: Shape, request: RequestSizes, itemsize: int) -> Work:
    weights = shape.tower.width * shape.width + shape.width**2
    return Work(2 * weights * request.batch * request.projected, weights * itemsize)


def _prefill(shape: Shape, request: RequestSizes, itemsize: int) -> Work:
    """LLaVA asks for the logits of every position left, not of the last one alone."""
    lengths = request.lengths or (request.length,) * shape.layers
    head, per_layer = shape.width * shape.vocab, _lm_layer_weights(shape)
    layers = sum(2 * per_layer * length + 4 * length**2 * shape.width for length in lengths)
    flops = request.batch * (layers + 2 * head * lengths[-1])
    weights = shape.layers * per_layer + head
    return Work(flops, weights * itemsize + cache_bytes(shape, request, itemsize))


def _lm_layer_weights(shape: Shape) -> int:
    attention = 2 * shape.width**2 + 2 * shape.width * shape.kv_width
    return attention + 3 * shape.width * shape.mlp
