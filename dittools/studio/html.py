"""The HTML fragments every tab uses; each escapes whatever text it is given."""

from collections.abc import Sequence
from html import escape

from dittools.studio.engine import Snapshot


def alert(text: str) -> str:
    """Return an error in a box that screen readers announce."""
    return f'<div class="dt-alert" role="alert">{escape(text)}</div>' if text else ""


def notice(text: str) -> str:
    """Return a remark in a box."""
    return f'<div class="dt-notice" role="status">{escape(text)}</div>' if text else ""


def sentence(text: str) -> str:
    """Return text as a sentence that starts and ends like one."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def empty(text: str) -> str:
    """Return what stands where results will appear."""
    return f'<div class="dt-empty">{escape(text)}</div>'


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], soft: Sequence[int] = ()) -> str:
    """Return a table that scrolls sideways on narrow screens; rows in `soft` are set back."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in headings)
    body = ""
    for number, row in enumerate(rows):
        kind = ' class="dt-soft"' if number in soft else ""
        body += f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
    return (
        f'<div class="dt-scroll" tabindex="0" role="region" aria-label="table"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def progress(shot: Snapshot, title: str = "") -> str:
    """Return the progress of a job: what runs, how far, how long still; empty when it is done."""
    if shot.state == "done":
        return ""
    if shot.state == "failed":
        return alert(sentence(shot.error))
    if shot.state == "stopped":
        return notice("Stopped. The model is ready for the next run.")
    if shot.state == "waiting":
        runs = "one run" if shot.ahead == 1 else f"{shot.ahead} runs"
        what = f"Waiting for {runs} to finish" if shot.ahead else "About to start"
        return _bar(what, "", None)
    where = f"{shot.done} of {shot.total}" if shot.total else ""
    left = f", about {duration(shot.left)} left" if shot.left is not None else ""
    detail = f"{where}{' · ' if where else ''}{duration(shot.seconds)}{left}"
    share = shot.share
    if share is None and shot.total:
        share = shot.done / shot.total
    what = shot.what[:1].upper() + shot.what[1:] or title or "Running"
    return _bar(what, detail, share)


def duration(seconds: float) -> str:
    """Return seconds as people say them: 8 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def _bar(what: str, detail: str, share: float | None) -> str:
    value = "" if share is None else f' value="{share:.3f}"'
    return (
        f'<div class="dt-progress"><div><b>{escape(what)}</b>'
        f"<span>{escape(detail)}</span></div>"
        f'<progress max="1"{value} aria-label="{escape(what)}"></progress></div>'
    )
