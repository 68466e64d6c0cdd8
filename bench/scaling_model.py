"""What one clip on several GPUs sends and computes per rank, from formulas.

Nothing here is measured: `Hardware` and `Network` are assumptions, everything else follows from
sizes. One forward of the denoiser on one sample; guidance and steps multiply all of it alike.
Source of the exchange: arXiv:2309.14509 (DeepSpeed-Ulysses), as diffusers writes it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dittools.errors import InputError
from dittools.patches.halo import Bands
from dittools.plans.balance import capacities

EXCHANGES = 4  # query, key and value before an attention, the result after it


@dataclass(frozen=True)
class Denoiser:
    """Sizes of a Wan-like denoiser and its input.

    Attributes:
        tokens: of the video.
        heads, head_dim, layers, ffn: as in config.json.
        text_tokens, text_dim: of the prompt, seen by cross-attention; on every rank in full.
        patch_in, patch_out: values of one token before and after the denoiser.
        freq_dim: of the timestep's embedding.
        item: bytes of a value on the wire.
    """

    tokens: int
    heads: int
    head_dim: int
    layers: int
    ffn: int
    text_tokens: int = 512
    text_dim: int = 4096
    patch_in: int = 64
    patch_out: int = 64
    freq_dim: int = 256
    item: int = 2

    @property
    def channels(self) -> int:
        """Values of a token inside."""
        return self.heads * self.head_dim

    @property
    def attention_flops(self) -> float:
        """Self-attention of all layers, dense: two products of 2 N^2 C each."""
        return 4.0 * self.tokens**2 * self.channels * self.layers

    @property
    def split_flops(self) -> float:
        """All other products over the video's tokens, which ranks share."""
        c = self.channels
        block = 12 * c * c + 4 * self.text_tokens * c + 4 * c * self.ffn
        return float(self.tokens * (self.layers * block + 2 * c * self.patch_out))

    @property
    def repeated_flops(self) -> float:
        """Products every rank does in full: keys and values of the text, embeddings."""
        c = self.channels
        text = self.text_tokens * 2 * (self.text_dim * c + c * c)
        time = 2 * (self.freq_dim * c + c * c + 6 * c * c)
        return float(
            self.layers * 4 * self.text_tokens * c * c
            + text
            + time
            + 2 * self.tokens * self.patch_in * c
        )


@dataclass(frozen=True)
class Hardware:
    """Assumed speed of one GPU.

    Attributes:
        attention_tflops: sustained in attention, dense or over kept blocks.
        linear_tflops: sustained in matrix products.
        latency_us: of one collective, whatever its size.
    """

    attention_tflops: float = 500.0
    linear_tflops: float = 600.0
    latency_us: float = 20.0


@dataclass(frozen=True)
class Network:
    """Assumed links.

    Attributes:
        name: for the page.
        node: most GPUs that reach each other over the inside links; larger groups are spread
            evenly over as few nodes as hold them.
        inside_gbs, outside_gbs: 10^9 bytes a second that one GPU sends inside and out of its node;
            both at once.
    """

    name: str
    node: int
    inside_gbs: float
    outside_gbs: float


NETWORKS = (
    Network("one NVLink domain", 72, 360.0, 40.0),
    Network("8 GPUs on NVLink, 400 Gb/s each between nodes", 8, 360.0, 40.0),
    Network("8 GPUs on PCIe, 100 Gb/s each between nodes", 8, 20.0, 10.0),
)


@dataclass(frozen=True)
class Estimate:
    """One forward on the busiest rank.

    Attributes:
        ranks: of the group.
        heads: on the busiest rank; a fraction where the ranks cannot share them.
        mode: "one GPU", "ulysses", "ulysses_anything", or "refused".
        layer_bytes: sent to other ranks by one attention.
        bytes: sent in all, the gathering of the result included.
        flops: with self-attention at the density.
        compute_ms, attention_ms, communication_ms: nothing overlaps.
    """

    ranks: int
    heads: float
    mode: str
    layer_bytes: float
    bytes: float
    flops: float
    compute_ms: float
    attention_ms: float
    communication_ms: float


def mode_of(heads: int, ranks: int) -> str:
    """Return how heads are spread: "one GPU", "ulysses", "ulysses_anything" or "refused"."""
    if ranks == 1:
        return "one GPU"
    if heads % ranks == 0:
        return "ulysses"
    try:
        capacities(heads, ranks)
    except InputError:
        return "refused"
    return "ulysses_anything"


def exchanged(
    local: float, tokens: int, slots: float, head_dim: int, ranks: int, item: int
) -> float:
    """Return the bytes one rank sends to others for one attention.

    Args:
        local: tokens of this rank.
        tokens: of all.
        slots: heads a rank gets, padding included: ceil(heads / ranks).
        head_dim, ranks, item: values of a head, ranks, bytes of a value.
    """
    before = 3 * local * slots * (ranks - 1)  # its tokens to each of the others, their heads
    after = (tokens - local) * slots  # the others' tokens, its heads
    return (before + after) * head_dim * item


def gathered(local: int, width: int, ranks: int, item: int) -> int:
    """Return the bytes one rank sends when every rank gets the whole result once per forward."""
    return local * width * item * (ranks - 1)


def halo_bytes(bands: Bands, rank: int, heads: int, head_dim: int, item: int) -> dict[str, int]:
    """Return the bytes one rank sends for one attention when bands exchange a halo of rows.

    Keys and values of rows that others need; its piece of the text's query, key and value, padded
    to the longest piece, to all others; and for each other rank the result and log-sum-exp of that
    rank's piece of the text, fp32.
    """
    others = [other for other in range(len(bands.own)) if other != rank]
    reached = (bands.overlap(rank, other) for other in others)
    rows = sum(max(high - low, 0) for low, high in reached)
    told = sum(bands.text[other] for other in others)
    return {
        "send": 2 * rows * heads * head_dim * item + told * heads * (head_dim + 1) * 4,
        "all_gather": 3 * max(bands.text) * heads * head_dim * item * len(others),
    }


def announced(ranks: int, attentions: int, forwards: int) -> int:
    """Return the bytes with which Ulysses Anything tells lengths: int64, four times an attention
    and once with the result.
    """
    return 8 * (ranks - 1) * (EXCHANGES * attentions + forwards)


def estimate(
    model: Denoiser, ranks: int, density: float, hardware: Hardware, network: Network
) -> Estimate:
    """Return what the busiest rank does; refused counts get the formula's fraction of heads."""
    mode = mode_of(model.heads, ranks)
    share = model.heads / ranks
    slots = float(-(-model.heads // ranks)) if mode == "ulysses_anything" else share
    local = model.tokens / ranks
    layer = exchanged(local, model.tokens, slots, model.head_dim, ranks, model.item)
    final = local * model.patch_out * model.item * (ranks - 1)
    attention = model.attention_flops * density * slots / model.heads
    linear = model.split_flops / ranks + model.repeated_flops
    attention_ms = attention / hardware.attention_tflops / 1e9
    sent = layer * model.layers + (final if ranks > 1 else 0.0)
    return Estimate(
        ranks,
        slots,
        mode,
        layer,
        sent,
        attention + linear,
        attention_ms + linear / hardware.linear_tflops / 1e9,
        attention_ms,
        _milliseconds(sent, EXCHANGES * model.layers + 1, ranks, hardware, network),
    )


def _milliseconds(
    sent: float, collectives: int, ranks: int, hardware: Hardware, network: Network
) -> float:
    """Return the time of all exchanges: the slower of the links inside a node and out of it."""
    if ranks == 1:
        return 0.0
    inside = ranks // -(-ranks // network.node)  # GPUs in the smallest of the nodes
    outside = sent * (ranks - inside) / (ranks - 1)
    slower = max((sent - outside) / network.inside_gbs, outside / network.outside_gbs)
    return slower / 1e6 + collectives * hardware.latency_us / 1e3


def crossing(
    model: Denoiser,
    density: float,
    hardware: Hardware,
    network: Network,
    most: int,
    time: Callable[[Estimate], float],
) -> int | None:
    """Return the least number of ranks at which exchanging takes longer than computing, if any.

    Every number up to `most` is looked at, whether or not the heads can be shared by so many.
    """
    for ranks in range(2, most + 1):
        found = estimate(model, ranks, density, hardware, network)
        if found.communication_ms > time(found):
            return ranks
    return None


def critical_density(
    model: Denoiser, ranks: int, hardware: Hardware, network: Network, whole: bool
) -> float:
    """Return the density at which exchanging takes as long as attention, or as all computing.

    Above 1: exchanging takes longer even when all is dense; 0: never longer.
    """
    dense = estimate(model, ranks, 1.0, hardware, network)
    rest = dense.compute_ms - dense.attention_ms if whole else 0.0
    return max(dense.communication_ms - rest, 0.0) / dense.attention_ms


def fitting(heads: int, ranks: int) -> int:
    """Return the largest group that shares the heads evenly and divides the ranks."""
    return max(n for n in range(1, ranks + 1) if ranks % n == 0 and heads % n == 0)


def least_slowest(work: Sequence[float], ranks: int) -> float:
    """Return what the slowest rank's work over the mean cannot fall below, equal head counts given.

    Of the m * ranks + 1 heaviest heads some rank has m + 1, and at best the lightest heads beside
    them.
    """
    each, ordered = len(work) // ranks, sorted(work)
    found = [1.0]
    for m in range(each):
        heavy = ordered[len(work) - m * ranks - 1 :][: m + 1]
        found.append((sum(heavy) + sum(ordered[: each - m - 1])) * ranks / sum(work))
    return max(found)
