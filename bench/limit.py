"""The least that a sequential method has to compute and hold, counted; and how fast this machine
multiplies matrices."""
import statistics
import time
from dataclasses import dataclass

import torch

from calib_prune.kernels.matmul import linear, prefers_onednn
from calib_prune.model.likelihood import common_prefix


@dataclass(frozen=True)
class Shape:
    "What a decoder layer of the LLaMA family is made of."
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config) -> "Shape":
        "The shape that a transformers configuration describes."
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.hidden_size, config.intermediate_size, heads, config.num_key_value_heads,
                   head_dim)

    @property
    def weights(self) -> int:
        "Weights of a layer's linear maps."
        return (
            2 * (self.heads + self.kv_heads) * self.head_dim + 3 * self.intermediate
        ) * self.hidden

    @property
    def inputs(self) -> list[int]:
        "Widths of the inputs that need statistics: of q, k, v; of o; of gate, up; of down."
        return [self.hidden, self.heads * self.head_dim, self.hidden, self.intermediate]


def pass_flops(shape: Shape, tokens: int, length: int, down: bool = True) -> int:
    """Floating-point operations of all windows' pass through one layer, products only.

    A product with a matrix costs two operations a weight and token. Attention costs twice that of
    one inner product of
    `heads × head_dim` (scores, then values) for each of the (length + 1) / 2 tokens that a causal
    query sees on average.
    """
    wide = shape.heads * shape.head_dim
    linears = shape.weights - (0 if down else shape.hidden * shape.intermediate)
    return 2 * tokens * linears + 2 * tokens * wide * (length + 1)


def moment_flops(shape: Shape, tokens: int) -> int:
    """Operations of the symmetric half, diagonal included, of the second moments of a layer's four
    inputs."""
    return sum(tokens * d * (d + 1) for d in shape.inputs)


def prune_flops(shape: Shape, layers: int, tokens: int, length: int, moments: bool = True) -> int:
    """Operations that no sequential method avoids.

    Each layer's statistics need a pass with the dense weights up to the input of `down`, whose
    output nobody reads; each layer
    but the last needs a second, whole pass with the pruned weights. SparseGPT needs second moments,
    Wanda doesn't. Solving is
    left out.
    """
    statistics = pass_flops(shape, tokens, length, down=False) + (
        moment_flops(shape, tokens) if moments else 0
    )
    return layers * statistics + (layers - 1) * pass_flops(shape, tokens, length)


def shared_tokens(sequences: list[list[int]]) -> tuple[int, int]:
    """Tokens of sequences that begin alike, each counted once, and how many tokens they see in all,
    themselves included."""
    tokens = seen = 0
    before: list[int] = []
    for sequence in sorted(sequences):
        shared = common_prefix(before, sequence)
        tokens += len(sequence) - shared
        seen += sum(range(shared + 1, len(sequence) + 1))
        before = sequence
    return tokens, seen


def score_flops(
    shape: Shape, layers: int, vocabulary: int, requests: list[tuple[list[int], list[int]]]
) -> int:
    """Operations that no method avoids that scores continuations after contexts, products only.

    Each token of the tree that all texts form passes the layers once, and attends to what is before
    it in its text. The output
    head is needed once for each token of the tree after which a token of a continuation is
    predicted.
    """
    tokens, seen = shared_tokens([(context + new)[:-1] for context, new in requests])
    predicts = {
        tuple((context + new)[:i])
        for context, new in requests
        for i in range(len(context), len(context + new))
    }
    wide = shape.heads * shape.head_dim
    return (
        layers * (2 * tokens * shape.weights + 4 * seen * wide)
        + 2 * len(predicts) * vocabulary * shape.hidden
    )


def prune_bytes(shape: Shape, parameters: int, tokens: int, batch_tokens: int) -> dict[str, int]:
    """What a prune has to hold, in bytes of float32.

    `windows`: the hidden states of all windows. `batch`: while `down`'s input is made, one batch's
    residual and normalised
    hidden states, and its gate, up and their product.
    """
    batch = min(batch_tokens, tokens)
    return dict(
        model=4 * parameters,
        statistics=4 * sum(d * d for d in shape.inputs),
        windows=4 * tokens * shape.hidden,
        batch=4 * batch * (2 * shape.hidden + 3 * shape.intermediate),
    )


def product_rate(
    sizes: tuple[int, ...] = (1024, 2048, 4096), seconds: float = 3.0
) -> dict[int, float]:
    """The rate of float32 products of square matrices by their size, operations a second.

    Of every library that torch brings the median of repetitions, and of those the best.
    """
    libraries, rates = [torch.mm, *([linear] if prefers_onednn() else [])], {}
    for n in sizes:
        a, b, medians = torch.randn(n, n), torch.randn(n, n), []
        for product in libraries:
            found, until = [], time.perf_counter() + seconds
            while time.perf_counter() < until:
                start = time.perf_counter()
                product(a, b)
                found.append(2 * n**3 / (time.perf_counter() - start))
            medians.append(statistics.median(found))
        rates[n] = max(medians)
    return rates
