"""docs/metered.md, made of what bench/ablation.py measured."""

from typing import Any

INTRO = """# Metered sparse attention, part by part

`metered` joins what publications hold apart: blocks cut along the axis order of each head, chosen
by the error of skipping them per cost, skipped ones replaced by their means inside the one softmax,
and some random rows attended exactly. These rows are the meter: they tell the true error of every
call without a dense run, mend the other rows through a gated regression, say which heads need new
blocks, more blocks, or dense attention for a while. A block is judged by few of its queries, other
ones at every step, and what earlier steps found counts on by half. `make ablation` makes this page;
[metered.json](results/metered.json) has the numbers per prompt and head.

**How rows are made comparable.** `executed` is the share of query-key pairs that kernels work
through: attended blocks, the one key per skipped block, and the probe rows. Every row is set to the
same executed share on a prompt that is not among the {prompts} held-out ones it is then measured
on. Choosing is not part of it: it is in the CPU seconds, which are those of one thread, and in the
table of costs. No row has dense steps, where the text does not say so. Blocks hold 32 tokens; the
embedded model has 1,728, so 64 probe rows are 3.7 % of a dense call here, and .2 % at 32 thousand.
Rows marked * look no longer at blocks nothing is known of than at others (`first_look=1`), as the
method did when they were measured; they are compared with the row of just that. The seconds of
`metered` itself were taken while the machine had other work, and are too high.
"""
FLOORS = ("random", "dense, another seed")


def page(content: dict[str, Any], board: dict[str, Any]) -> str:
    """Return the page.

    Args:
        content: of bench/ablation.py.
        board: scoreboard.json, for the rows of other methods.
    """
    parts = []
    clips = content.get("clips", {})
    counts = [line["prompts"] for lines in clips.values() for line in lines]
    parts.append(INTRO.format(prompts=max(counts, default=0)))
    for share, lines in clips.items():
        parts += _clips(share, lines, board["densities"].get(share, []))
    if content.get("warm"):
        parts += _warm(content["warm"])
    for share, lines in content.get("heads", {}).items():
        parts += _heads(share, lines)
    if "cost" in content:
        parts += _cost(content["cost"])
    return "\n".join(parts).rstrip() + "\n"


def _clips(share: str, lines: list[dict[str, Any]], board: list[dict[str, Any]]) -> list[str]:
    """Return the table of one executed share: parts, then everything else, best first."""
    others = [{**b, "kind": b["kind"] if b["kind"] != "method" else "published"} for b in board]
    others = [
        b
        for b in others
        if b["kind"] not in ("reference", "searched")
        and b["name"] != "metered"
        and _is_near(b, share)
    ]
    most = max((line["prompts"] for line in lines), default=0)
    parts = [line for line in lines if line["kind"] == "part"]
    whole = next((line for line in parts if line["name"] == "metered"), None)
    rest = [line for line in lines if line["kind"] != "part"] + others
    text = [
        f"## Clips at an executed share of {share}",
        "",
        "| | PSNR dB | against metered | SSIM | prompt score | executed | attention CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    named = {line["name"]: line for line in parts}
    for line in parts:
        text.append(_row(line, named.get(line.get("against", ""), whole), most))
    text += ["| *other methods* | | | | | | |"]
    text += [_row(line, whole, most) for line in sorted(rest, key=lambda x: -x["psnr_db"])]
    if whole is not None:
        text += ["", _verdict(whole, rest)]
    return [*text, ""]


def _is_near(line: dict[str, Any], share: str) -> bool:
    """Whether a row of the board is at the density, or is the floor of another seed."""
    return line["name"] in FLOORS or abs(line["density"] - float(share)) <= 0.03


def _row(line: dict[str, Any], whole: dict[str, Any] | None, most: int) -> str:
    name = line["name"]
    if line.get("detail"):
        name += f" ({line['detail']})"
    name += " *" if line.get("against") else ""
    if line["prompts"] < most:
        name += f" ({line['prompts']} prompts)"
    apart = _apart(line, whole)
    return (
        f"| {name} | {line['psnr_db']:.2f} | {apart} | {line['ssim']:.3f} | {line['prompt']:.0%} "
        f"| {line['computed']:.3f} | {line['attention_s']:.2f} |"
    )


def _apart(line: dict[str, Any], whole: dict[str, Any] | None) -> str:
    """Return the mean difference over the prompts both have, and its standard error."""
    if whole is None or line is whole:
        return ""
    pairs = zip(line["psnr_db_each"], whole["psnr_db_each"], strict=False)
    gaps = [a - b for a, b in pairs]
    mean = sum(gaps) / len(gaps)
    spread = sum((g - mean) ** 2 for g in gaps) / max(1, len(gaps) - 1)
    return f"{mean:+.2f} ± {(spread / len(gaps)) ** 0.5:.2f}"


def _verdict(whole: dict[str, Any], rest: list[dict[str, Any]]) -> str:
    """Return one sentence on the best other row that executes no more than a little above."""
    fair = [
        x for x in rest if x["kind"] == "published" and x["computed"] <= whole["computed"] + 0.03
    ]
    joined = [x for x in rest if x["kind"] == "combination"]
    text = []
    if fair:
        best = max(fair, key=lambda x: float(x["psnr_db"]))
        text.append(
            f"The best single method at this executed share is {best['name']} with "
            f"{best['psnr_db']:.2f} dB; metered has {whole['psnr_db'] - best['psnr_db']:+.2f} dB "
            "against it."
        )
    if joined:
        best = max(joined, key=lambda x: float(x["psnr_db"]))
        text.append(
            f"Of the published combinations and what can be made of their parts, "
            f"{best['name']} comes nearest with {best['psnr_db']:.2f} dB."
        )
    return " ".join(text)


def _warm(lines: list[dict[str, Any]]) -> list[str]:
    """Return the table of dense first steps."""
    text = [
        "## Dense first steps",
        "",
        "The same, with all steps at the start dense, and an executed share of .2 behind them.",
        "",
        "| | dense steps of 12 | PSNR dB | SSIM | executed, whole run | attention CPU s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        steps = (
            f"{round(12 * line['warm_up'])}" if line["params"].get("start", 0) == 0 else "by head"
        )
        text.append(
            f"| {line['name']} | {steps} | {line['psnr_db']:.2f} | {line['ssim']:.3f} "
            f"| {line['computed']:.3f} | {line['attention_s']:.2f} |"
        )
    return [*text, ""]


def _heads(share: str, lines: dict[str, Any]) -> list[str]:
    """Return the table of errors on recorded attention, best first, and where parts do harm."""
    text = [
        f"## Recorded attention at an executed share of {share}",
        "",
        "Relative error of the output against dense attention on the same query, key and value, "
        "over all steps and branches of one clip that runs dense throughout: all heads together, "
        "the median head, and the heads that `metered` leaves further off than the row does. Other "
        "methods than combinations are set to the density; what they execute stands beside them.",
        "",
        "| | error | median head | executed | heads where it beats metered |",
        "| --- | --- | --- | --- | --- |",
    ]
    whole = _flat(lines["metered"])
    for name, line in sorted(lines.items(), key=lambda x: float(x[1]["error"])):
        better = sum(a < b for a, b in zip(_flat(line), whole, strict=True))
        text.append(
            f"| {name} | {line['error']:.4f} | {line['median']:.4f} | {line['executed']:.3f} "
            f"| {better if name != 'metered' else ''} of {len(whole)} |".replace("|  of", "| of")
        )
    return [*text, "", *_harm(lines), ""]


def _flat(line: dict[str, Any]) -> list[float]:
    return [e for layer in line["heads"] for e in layer]


def _harm(lines: dict[str, Any]) -> list[str]:
    """Return a list of the parts and the heads each makes worse, at the same executed share."""
    whole, found = lines["metered"], []
    parts = "without repair", "without pooling", "blocks by mass, not error"
    for name in (name for name in parts if name in lines):
        heads = [
            f"{layer}.{head}"
            for layer, (a, b) in enumerate(zip(lines[name]["heads"], whole["heads"], strict=True))
            for head, (x, y) in enumerate(zip(a, b, strict=True))
            if x < y
        ]
        which = (
            f"better in {len(heads)} {'head' if len(heads) == 1 else 'heads'} ({', '.join(heads)})"
            if heads
            else "better in no head"
        )
        found.append(f"- *{name}*: {which}, written layer.head.")
    return found


def _blocks(line: dict[str, Any]) -> str:
    size, keys = line["block_size"], line.get("key_block", line["block_size"])
    words = f"blocks of {size}" if size == keys else f"blocks of {size} queries and {keys} keys"
    return words + (", alike keys" if line.get("keys") == "alike" else "")


def _cost(cost: dict[str, Any]) -> list[str]:
    """Return the table of what a call costs beyond its blocks."""
    names = list(cost["lines"][0]["parts"])
    text = [
        "## What it adds to a call",
        "",
        f"One head of {cost['tokens']:,} tokens, head_dim {cost['head_dim']}, density "
        f"{cost['density']:g}, CPU seconds of one thread as shares of a dense call; `added` is all "
        "but the blocks themselves and what happens once a run. Made with random numbers.",
        "",
        "| | dense s | " + " | ".join(names) + " | added |",
        "| --- | --- | " + " | ".join("---" for _ in names) + " | --- |",
    ]
    for line in cost["lines"]:
        shares = " | ".join(f"{100 * line['parts'][n]:.1f} %" for n in names)
        text.append(
            f"| {line['dtype']}, {_blocks(line)} | {line['dense_s']:.2f} | {shares} "
            f"| {100 * line['added']:.1f} % |"
        )
    first = (
        "Choosing is that of later steps. Where nothing is known of blocks yet, at the first step "
        "and with alike keys at every new grouping, `first_look` (4) times as many queries are "
        "looked at."
    )
    return [*text, "", first, "On a GPU nothing was measured."]
