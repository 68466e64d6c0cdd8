"""docs/scaling.md from the numbers in docs/results/scaling.json."""

from collections.abc import Iterable, Sequence
from typing import Any

_MODES = {
    "one GPU": "one GPU",
    "ulysses": "Ulysses",
    "ulysses_anything": "Ulysses Anything",
    "refused": "refused",
}
_THAN = {"attention": "attention", "all": "all computing"}


def page(found: dict[str, Any]) -> str:
    """Return the page in Markdown."""
    sections = (_opening, _table, _crossings, _measured, _balance, _halo)
    return "\n\n".join(section(found) for section in sections) + "\n"


def _rows(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _opening(found: dict[str, Any]) -> str:
    model = found["model"]
    c = model["heads"] * model["head_dim"]
    attention = 4 * model["tokens"] ** 2 * c * model["layers"] / 1e15
    dense = next(r for r in found["simulated"]["rows"] if r["ranks"] == 1 and r["density"] == 1)
    return f"""# Scaling of one clip over several GPUs

Written by `make scaling` from [`results/scaling.json`](results/scaling.json). Bytes and FLOPs
follow from sizes and are checked below; **every time on this page is an assumption at work, not a
measurement**: no multi-GPU machine was at hand.

How to run it: `pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=8))`
on every rank, then `dittools.attach(pipe, plan)` as on one GPU. Each rank runs the plan on its own
heads of the whole sequence, and the clip is the clip of one process: tested on 2 and 4 ranks with
Wan, Flux and others. Heads are dealt out so that ranks have like work;
`dittools forecast --plan plan.json --ranks 8` shows it.

## Bytes and FLOPs

{model["name"]}: {model["tokens"]:,} tokens, {model["heads"]} heads of {model["head_dim"]},
{model["layers"]} layers, bf16. One forward of one sample is {dense["flops"] / 1e15:.2f} PFLOP when
dense, {attention:.2f} of them self-attention. For N tokens, H heads of D values, R ranks and e
bytes a value, one attention makes every rank send

    4 N H D e (R - 1) / R^2        query, key, value before it, the result after it

to the others, **whatever the density**: Ulysses exchanges whole heads before anyone knows which
keys are kept. A forward adds N W e (R - 1) / R for its result of W values a token. A rank computes
d 4 N^2 H D / R FLOPs of attention at density d and 1 / R of all other products, save for the text's
keys and values and the embeddings, which every rank repeats. So bytes and FLOPs fall alike with R,
and what sparsity saves is computing alone: the sparser the plan, the sooner the network is what one
waits for."""


def _table(found: dict[str, Any]) -> str:
    simulated, model = found["simulated"], found["model"]
    net = found["assumed"]["networks"][0]["name"]
    densities = sorted({row["density"] for row in simulated["rows"]}, reverse=True)
    kept = [densities[0], *(d for d in densities if d in (0.3, 0.1))]
    at = {(row["ranks"], row["density"]): row for row in simulated["rows"] if row["network"] == net}
    rows = []
    for ranks in sorted({row["ranks"] for row in simulated["rows"]}):
        one = at[ranks, kept[0]]
        rows.append(
            [
                ranks,
                f"{one['heads']:g}",
                _MODES[one["mode"]],
                f"{one['layer_bytes'] / 2**20:.1f}",
                f"{one['bytes'] / 2**30:.2f}",
                *(f"{at[ranks, d]['flops'] / 1e12:,.1f}" for d in kept),
            ]
        )
    head = ["GPUs", "heads a rank", "runs as", "MiB sent a layer", "GiB sent a forward"]
    head += [f"TFLOP, density {d:g}" for d in kept]
    uneven = [n for n, group in simulated["groups"].items() if int(n) != group]
    groups = ", ".join(
        f"{n} GPUs as {int(n) // simulated['groups'][n]} groups of {simulated['groups'][n]}"
        for n in uneven
    )
    padded = ", ".join(str(n) for n in simulated["padded"])
    return f"""Per rank:

{_rows(head, rows)}

{model["heads"]} heads cannot be shared by {", ".join(uneven[:-1])} or {uneven[-1]} ranks, and the
rows for these are the formula's alone. diffusers refuses them too: plain Ulysses asks for a degree
that divides the heads, and `ulysses_anything=True` pads the last rank only, so that
fewer heads may be missing than a rank has (of the numbers up to 64, {padded} work too). dittools
says so before anything is sent, with the degrees that fit. Such machines run several clips side by
side: {groups}. A ring is no way out for a plan: it hands a rank one part of the keys at a time and
does not say which, so those calls run dense and the report says why."""


def _crossings(found: dict[str, Any]) -> str:
    assumed, simulated = found["assumed"], found["simulated"]
    nets = assumed["networks"]
    said = [
        f"- {net['name']}: {net['inside_gbs']:g} GB/s from each GPU to those of its node "
        f"({net['node']} GPUs), {net['outside_gbs']:g} GB/s to others"
        for net in nets
    ]
    most = max(row["ranks"] for row in simulated["rows"])

    def cell(value: int | None) -> str:
        return "-" if value is None else str(value)

    crossed = {(one["network"], one["density"]): one for one in simulated["crossings"]}
    densities = sorted({one["density"] for one in simulated["crossings"]}, reverse=True)
    rows = [
        [net["name"], words, *(cell(crossed[net["name"], d][of]) for d in densities)]
        for net in nets
        for of, words in _THAN.items()
    ]
    head = ["network", "longer than", *(f"density {d:g}" for d in densities)]
    ranks = sorted({one["ranks"] for one in simulated["critical"]})
    at = {(one["network"], one["ranks"]): one for one in simulated["critical"]}
    critical = [
        [name, words, *(f"{at[name, n][of]:.3f}" for n in ranks)]
        for name in (net["name"] for net in nets)
        for of, words in _THAN.items()
    ]
    lines = "\n".join(said)
    times = _times(found)
    return f"""## Where the network takes over

Assumed, and options of `bench/scaling.py`: {assumed["attention_tflops"]:g} TFLOP/s sustained in
attention at any density, {assumed["linear_tflops"]:g} in other products,
{assumed["latency_us"]:g} us a collective, nothing overlapped, heads evenly loaded, and

{lines}

A group larger than a node is spread evenly over as few nodes as hold it; links inside and out run
at once. Number of ranks from which exchanging takes longer, every number up to {most} tried by the
formula, "-" where none does:

{_rows(head, rows)}

Both sides fall with R, so more ranks hardly change the ratio once a group has left its node; what
counts is the link and the density. Density below which exchanging takes longer than attention, and
than all computing, by number of ranks (above 1: even when dense; 0: never):

{_rows(["network", "longer than", *map(str, ranks)], critical)}

Milliseconds of one forward, computing + exchanging:

{times}"""


def _times(found: dict[str, Any]) -> str:
    rows = found["simulated"]["rows"]
    densities = sorted({row["density"] for row in rows}, reverse=True)
    at = {(r["network"], r["ranks"], r["density"]): r for r in rows}
    lines = [
        [
            net["name"],
            ranks,
            *(
                f"{at[net['name'], ranks, d]['compute_ms']:.0f} + "
                f"{at[net['name'], ranks, d]['communication_ms']:.0f}"
                for d in densities
            ),
        ]
        for net in found["assumed"]["networks"]
        for ranks in sorted({row["ranks"] for row in rows if row["ranks"] not in (5, 10, 20)})
    ]
    return _rows(["network", "GPUs", *(f"density {d:g}" for d in densities)], lines)


def _measured(found: dict[str, Any]) -> str:
    rows = []
    for row in found["measured"]:
        formula, sparse, dense = row["formula"], row["sparse"], row["dense"]
        beside = ", ".join(f"{name} {n}" for name, n in row["beside"].items()) or "none"
        rows.append(
            [
                row["name"],
                f"{row['rank']} of {row['ranks']}",
                _MODES[row["mode"]],
                f"{formula['all_to_all']:,}",
                f"{dense['all_to_all']:,}",
                f"{sparse['all_to_all']:,}",
                f"{formula['all_gather']:,}",
                f"{sparse['all_gather']:,}",
                beside,
                f"{row['socket']:,}",
            ]
        )
    head = ["model", "rank", "runs as", "exchange: formula", "dense", "with a plan"]
    head += ["result: formula", "with a plan", "beside", "by TCP"]
    agree = all(row["agrees"] for row in found["measured"])
    verdict = (
        "Formula and count agree to the byte in every row, dense and with a plan."
        if agree
        else "**Formula and count differ**: the formula or this build of diffusers is wrong."
    )
    error = max(row["error"] for row in found["measured"])
    return f"""## Checked against real ranks

Bytes a rank hands to others in one generation, counted at the collectives of gloo processes on one
CPU, fp32; the plan keeps about 40 % of the pairs. {verdict} The clips differ from those of
one process by {error:.1e} of the largest latent at most.

{_rows(head, rows)}

Beside the formula, a plan adds one 4-byte flag a call: whether the inputs are finite, which all
ranks must judge alike. Uneven heads are padded to ceil(H / R) a rank, so the embedded model's 3
heads travel as 4, and Ulysses Anything tells lengths as integers in every call, which the formula
of the result includes. What TCP carried is more by gloo's own headers and handshakes."""


def _balance(found: dict[str, Any]) -> str:
    own = [
        [f"`{row['plan']}`", row["ranks"], "yes" if row["is_even"] else "no", *_over(row)]
        for row in found["balance"]["plans"]
    ]
    drawn = [
        [
            f"`{row['plan']}`",
            row["ranks"],
            40 // row["ranks"],
            f"{row['slowest'] - 1:.1%}",
            f"{row['least'] - 1:.1%}",
            f"{row['worst'] - 1:.1%}",
            f"{row['in_order'] - 1:.1%}",
        ]
        for row in found["balance"]["drawn"]
    ]
    head = ["densities of", "ranks", "heads a rank", "slowest above the mean"]
    head += ["no dealing below", "worst layer", "heads in order"]
    good = sorted({r["ranks"] for r in found["balance"]["drawn"]})
    good = [
        n
        for n in good
        if all(r["slowest"] <= 1.1 for r in found["balance"]["drawn"] if r["ranks"] == n)
    ]
    return f"""## Equal work

An exchange waits for the slowest rank. Heads of a plan differ in density, so they are dealt out by
their work, and every rank still gets as many as Ulysses wants. The aim is a slowest rank within
10 % of the mean. 40 layers of 40 heads with densities drawn from those of the committed plans:

{_rows(head, drawn)}

The aim is met on {", ".join(map(str, good[:-1]))} and {good[-1]} ranks. Beyond, single heads weigh
more than the spare room of a rank: the fifth column is what no dealing of whole heads can go below
(some rank must hold m + 1 of the m R + 1 heaviest heads). There a plan with evener heads helps, or
a smaller degree.

The committed plans themselves are for 3 heads a layer, too few to even out: a rank has one head,
or one rank two and the other one:

{_rows(["plan", "ranks", "even heads", "slowest", "worst layer", "heads in order"], own)}"""


def _over(row: dict[str, Any]) -> list[str]:
    return [f"{row[name] - 1:.1%}" for name in ("slowest", "worst", "in_order")]


def _halo(found: dict[str, Any]) -> str:
    radii = ("8", "16", "32")
    rows = [
        [
            row["ranks"],
            f"{row['ulysses'] / 2**20:.1f}" + ("" if row["mode"] == "ulysses" else " (refused)"),
            *(f"{row[radius] / 2**20:.1f}" for radius in radii),
        ]
        for row in found["halo"]["simulated"]
    ]
    measured = found["halo"]["measured"]
    counted = [
        [
            f"{row['rank']} of {row['ranks']}",
            f"{row['formula']['send']:,}",
            f"{row['counted']['send']:,}",
            f"{row['formula']['all_gather']:,}",
            f"{row['counted']['all_gather']:,}",
            f"{sum(row['ulysses'].values()):,}",
        ]
        for row in measured
    ]
    agree = all(row["agrees"] for row in measured)
    verdict = "They agree to the byte" if agree else "**They differ**"
    error = max(row["error"] for row in measured)
    head = ["rank", "rows and text: formula", "counted", "gathered: formula", "counted"]
    return f"""## Images: a halo of rows

`dittools.attach(pipe, plan, exchange="halo")` is another exchange for images under `gna` and
`clear`, which look a few rows up and down: a rank stays with its band of the image and all heads,
and fetches keys and values of the rows around it. Text sees the whole image: every rank lets all
text attend to its own tokens, and the parts are merged by their log-sum-exps, which is exact. Heads
need not divide by the ranks, and no rank waits for a denser head. Calls that cannot run this way
(dense steps or heads, other methods, videos, attention masks, pooled keys) exchange heads as above,
and the report says why.

With h rows around a band on either side, W tokens a row, T of text, C = H D, a rank sends for one
attention

    4 h W C e                      keys and values of rows, above and below
    + 3 T C e (R - 1) / R          query, key and value of its text, to everyone
    + 4 T (C + H) (R - 1) / R      its part of the text's result, fp32, to everyone

The first line does not fall with R, so a halo pays for few ranks and short reaches. FLUX.1-dev,
4096 x 4096 pixels (256 x 256 tokens and 512 of text), bf16, `clear`: MiB one attention makes the
busiest rank send, by radius.

{_rows(["GPUs", "Ulysses", *(f"halo, radius {radius}" for radius in radii)], rows)}

A mask is never traded for dense attention here, which would need all keys.

Toy Flux, radius 2, one image on real ranks, counted as above; beside it what Ulysses sends.
{verdict}; the images differ from that of one process by {error:.1e} of the largest
latent at most.

{_rows([*head, "Ulysses in all"], counted)}"""
