"""Blind votes between clips of the history, and the comparison report of chosen runs."""

import secrets
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from dittools.errors import DitToolsError
from dittools.metrics.vote import Trial
from dittools.pipelines.output import write_text
from dittools.studio import ballots, html
from dittools.studio.comparison import MOST, can_compare, report_of
from dittools.studio.context import Context
from dittools.studio.result import file_url
from dittools.studio.runs import Run
from dittools.studio.tabs.jobs import on_tab_select, sentence

EMPTY = (
    "There is nothing to vote on yet. Generate a clip, dense and accelerated; two methods can be "
    "compared once both have made the same prompt with the same seed."
)
READY = "Choose two sides and press Start. You will not be told which clip is which."
REPORTS = "reports"  # below the run folder: comparison pages
_VOTES = (("a", "A is closer"), ("same", "I see no difference"), ("b", "B is closer"))


@dataclass(frozen=True)
class Ballot:
    """One page's vote: the questions still open, and the copies of the one on show.

    Attributes:
        contest: who meets whom.
        voter: name, may be empty.
        open: questions without a vote, the first is shown.
        answered: votes cast on this page.
        copies: "a", "b", "x" -> file with a name that tells nothing.
    """

    contest: ballots.Contest
    voter: str
    open: tuple[Trial, ...]
    answered: int = 0
    copies: dict[str, Path] = field(default_factory=dict)


def build(context: Context) -> None:
    """Put the tab's components on the page."""
    ballot = gr.State(None, delete_callback=_forget)
    first_choices = _labels(context)
    with gr.Row():
        first = gr.Dropdown(
            first_choices, value=_nth(first_choices, 0), label="One side", elem_id="vote-first"
        )
        second = gr.Dropdown(
            first_choices, value=_nth(first_choices, 1), label="Other side", elem_id="vote-second"
        )
        voter = gr.Textbox(
            label="Your name", placeholder="optional", max_length=60, elem_id="vote-name"
        )
    start = gr.Button("Start", variant="primary", elem_id="vote-start")
    shown = gr.HTML(_idle(first_choices), elem_id="vote-ballot")
    with gr.Row(visible=False) as answers:
        buttons = {choice: gr.Button(words, elem_id=f"vote-{choice}") for choice, words in _VOTES}
    result = gr.Button("Show the result so far", visible=False, elem_id="vote-result")
    outcome = gr.HTML(elem_id="vote-outcome")
    page = [ballot, shown, answers, result, outcome]
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    start.click(
        lambda one, other, who, old: _start(context, one, other, who, old),
        [first, second, voter, ballot],
        page,
        **quiet,
    )
    for choice, button in buttons.items():
        button.click(lambda now, c=choice: _cast(context, now, c), ballot, page, **quiet)
    result.click(lambda now: _result(context, now), ballot, page, **quiet)
    runs = _report(context)

    def refresh(one: str | None, other: str | None, now: Ballot | None) -> list[Any]:
        listed = _labels(context)
        keep = [
            value if value in listed else _nth(listed, n) for n, value in enumerate((one, other))
        ]
        return [
            gr.update(choices=listed, value=keep[0]),
            gr.update(choices=listed, value=keep[1]),
            gr.skip() if now is not None else _idle(listed),
            gr.update(choices=_comparable(context)),
        ]

    on_tab_select(refresh, [first, second, ballot], [first, second, shown, runs])


def _report(context: Context) -> Any:
    """Put the comparison report on the page; return its field of runs."""
    with gr.Accordion("Comparison report of several runs", open=False, elem_id="compare"):
        runs = gr.Dropdown(
            _comparable(context),
            multiselect=True,
            max_choices=MOST,
            label="Runs",
            info="The first one is what the others are held to.",
            elem_id="compare-runs",
        )
        make = gr.Button("Make the report", elem_id="compare-make")
        said = gr.HTML(elem_id="compare-said")
        file = gr.DownloadButton("Download the report", visible=False, elem_id="compare-file")
    make.click(lambda ids: _write_report(context, ids), runs, [said, file], show_progress="minimal")
    return runs


def _write_report(context: Context, ids: list[str] | None) -> tuple[str, Any]:
    try:
        text = report_of([context.runs.open(run_id) for run_id in ids or []])
        path = context.runs.root / REPORTS / secrets.token_hex(6) / "comparison.html"
        write_text(path, text)
    except DitToolsError as error:
        return html.alert(sentence(error)), gr.update(visible=False)
    return html.notice("The report is ready."), gr.update(value=str(path), visible=True)


def _comparable(context: Context) -> list[tuple[str, str]]:
    return [
        (f"{run.created[:16].replace('T', ' ')} · {_made(run)} · {run.title[:80]}", run.id)
        for run in context.runs.entries()
        if can_compare(run)
    ]


def _made(run: Run) -> str:
    """Return the method and the seed of a run, which titles do not tell."""
    if run.kind == "bench":
        return "benchmark"
    method = "plan" if run.facts.get("from_plan") else run.facts.get("method") or "default"
    return f"{method}, seed {(run.facts.get('settings') or {}).get('seed', '?')}"


def _labels(context: Context) -> list[str]:
    return ballots.labels(ballots.entries(context.runs.entries()))


def _nth(listed: list[str], number: int) -> str | None:
    return listed[number] if number < len(listed) else None


def _idle(listed: list[str]) -> str:
    return html.empty(READY if listed else EMPTY)


def _start(
    context: Context, first: str | None, second: str | None, voter: str, old: Ballot | None
) -> list[Any]:
    """Return the page with the first question without a vote."""
    _forget(old)
    try:
        ballots.sweep(context.runs)
        listed = ballots.entries(context.runs.entries())
        contest = ballots.contest(listed, first or "", second or "")
        every = ballots.questions(contest, voter, secrets.randbits(32))
        waiting = ballots.unanswered(context.runs, contest, every)
        return _page(context, Ballot(contest, voter, tuple(waiting)))
    except DitToolsError as error:
        return _refused(None, error)


def _cast(context: Context, ballot: Ballot | None, choice: str) -> list[Any]:
    """Return the page after one vote."""
    if ballot is None or not ballot.open:
        return _closed(None, html.alert("No question is open. Press Start."))
    try:
        ballots.vote(context.runs, ballot.contest, ballot.open[0], choice)
        ballots.forget(ballot.copies)
        following = replace(ballot, open=ballot.open[1:], answered=ballot.answered + 1, copies={})
        return _page(context, following)
    except DitToolsError as error:
        return _refused(ballot, error)


def _result(context: Context, ballot: Ballot | None) -> list[Any]:
    """Return the page with the result; the open question stays."""
    if ballot is None:
        return _closed(None, "")
    try:
        text = _outcome(context, ballot)
    except DitToolsError as error:
        return _refused(ballot, error)
    return [ballot, gr.skip(), gr.skip(), gr.skip(), text]


def _page(context: Context, ballot: Ballot) -> list[Any]:
    """Return the next question, or the result after the last: before, it would give sides away."""
    if not ballot.open:
        return _closed(ballot, _outcome(context, ballot))
    ready = replace(ballot, copies=ballots.blind_copies(context.runs, ballot.open[0]))
    yes = gr.update(visible=True)
    return [ready, _question(ready), yes, gr.update(visible=ballot.answered > 0), ""]


def _closed(ballot: Ballot | None, outcome: str) -> list[Any]:
    """Return the page without a question."""
    no = gr.update(visible=False)
    said = READY if ballot is None else "Every pair has your vote. Thank you."
    return [ballot, html.empty(said), no, no, outcome]


def _refused(ballot: Ballot | None, error: DitToolsError) -> list[Any]:
    return [ballot, *[gr.skip()] * 3, html.alert(sentence(error))]


def _question(ballot: Ballot) -> str:
    """Return X, A and B; the prompt is not told, a label may name a method."""
    number, count = ballot.answered + 1, ballot.answered + len(ballot.open)
    clips = "".join(
        _clip(ballot.copies[name], words)
        for name, words in (("x", "X, the reference"), ("a", "A"), ("b", "B"))
    )
    return (
        f'<section aria-label="question {number} of {count}"><p><b>Pair {number} of {count}.</b> '
        f'Which one is closer to X?</p><div class="dt-ballot">{clips}</div></section>'
    )


def _clip(path: Path, words: str) -> str:
    source = escape(file_url(path))
    if path.suffix == ".png":
        inner = f'<img src="{source}" alt="{escape(words)}">'
    else:
        inner = (
            f'<video src="{source}" autoplay loop muted playsinline controls '
            f'aria-label="{escape(words)}"></video>'
        )
    return f"<figure>{inner}<figcaption>{escape(words)}</figcaption></figure>"


def _outcome(context: Context, ballot: Ballot) -> str:
    """Return the result in words and as an interval."""
    counted = ballots.tally(context.runs, ballot.contest)
    words = f"<p>{escape(ballots.sentence(ballot.contest, counted))}</p>"
    if counted.share is None:
        return f'<div role="status">{words}</div>'
    style = f"--low:{counted.low:.4f};--high:{counted.high:.4f};--share:{counted.share:.4f}"
    first, second = escape(ballot.contest.first), escape(ballot.contest.second)
    return (
        f'<div role="status">{words}<div class="dt-interval" style="{style}" role="img" '
        f'aria-label="interval {counted.low:.0%} to {counted.high:.0%}"><i></i><b></b><u></u>'
        f"<span>always {second}</span><span>always {first}</span></div></div>"
    )


def _forget(ballot: Ballot | None) -> None:
    if ballot is not None:
        ballots.forget(ballot.copies)
