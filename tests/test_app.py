"""The studio end to end, as a person sees it. `make test-app` runs this."""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from browsing import PATIENCE_MS, ROOT, chromium, open_page, shot, studio, tab

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("runs")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    with studio(runs) as found:
        yield found


def fill(page: Any, **values: object) -> None:
    for name, value in values.items():
        field = page.locator(f"#gen-{name} :is(input, textarea)").first
        field.fill(str(value))
        field.blur()


def small(page: Any, prompt: str, seed: int = 0, steps: int = 2) -> None:
    """Ask for a clip that takes a moment."""
    fill(page, prompt=prompt, height=32, width=32, frames=4, steps=steps, guidance=1, seed=seed)


def finished(page: Any) -> None:
    page.locator("#gen-details .dt-again").wait_for()


def saved(runs: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in runs.glob("*/run.json")]
    return sorted(found, key=lambda run: run["created"])


def test_generate_shows_both_clips_and_the_numbers(browser: Any, address: str, runs: Path) -> None:
    page = open_page(browser, address)
    page.locator("#gen-start").click()
    page.locator("#gen-ahead .dt-tiles").wait_for()  # the forecast stands before the first clip
    page.locator("#gen-player video").first.wait_for()
    finished(page)
    page.wait_for_function(
        "document.querySelector('#gen-player dt-player').seek.max === '11'"
        " && [...document.querySelectorAll('#gen-player video')].every((v) => v.readyState > 1)"
    )
    text = page.locator("#gen-details").inner_text()
    report = saved(runs)[-1]["facts"]["report"]
    for value in (
        f"{report['speedup']:.2f}x",
        f"{report['density']:.2f}",
        f"{report['fidelity']['psnr_db']:.1f} dB",
        f"{report['fidelity']['ssim']:.3f}",
        f"floor {report['floors']['random_blocks']['psnr_db']:.1f} dB",
    ):
        assert value in text
    assert page.locator("#gen-player video").count() == 3
    shot(page, "generate-1280")
    page.close()


def test_player_steps_wipes_and_shows_the_difference(browser: Any, address: str) -> None:
    page = open_page(browser, address)
    small(page, "a blue circle")
    page.locator("#gen-start").click()
    finished(page)
    player = page.locator("#gen-player dt-player")
    times = "[...document.querySelectorAll('#gen-player video')].map((v) => v.currentTime)"
    page.wait_for_function("document.querySelector('#gen-player dt-player').seek.max === '3'")
    if player.locator("[data-do=play]").inner_text() == "Pause":
        player.locator("[data-do=play]").click()
    player.locator("[data-do=seek]").fill("2")
    page.wait_for_function(f"{times}.every((t) => Math.abs(t - 2.5 / 8) < 0.02)")
    player.locator("[data-do=next]").click()
    page.wait_for_function(f"{times}.every((t) => Math.abs(t - 3.5 / 8) < 0.02)")
    player.get_by_role("button", name="Wipe").click()
    player.locator(".dt-wipe input").fill("25")
    clip = page.locator("#gen-player [data-clip=accelerated] video")
    assert clip.evaluate("(v) => getComputedStyle(v).clipPath") == "inset(0px 0px 0px 25%)"
    shot(page, "wipe-1280")
    player.get_by_role("button", name="Difference").click()
    assert page.locator("#gen-player [data-clip=difference]").is_visible()
    assert not page.locator("#gen-player [data-clip=dense]").is_visible()
    assert "of the range" in player.locator(".dt-legend").inner_text()
    page.close()


def test_stop_stops_the_run_and_the_next_one_works(browser: Any, address: str, runs: Path) -> None:
    before = len(saved(runs))
    page = open_page(browser, address)
    small(page, "a red circle", steps=1000)
    page.locator("#gen-start").click()
    page.locator("#gen-status .dt-progress", has_text="Dense 1 of 1").wait_for()
    shot(page, "running-1280")
    page.locator("#gen-stop").click()
    page.locator("#gen-status", has_text="Stopped").wait_for()
    assert len(saved(runs)) == before
    assert [p.name for p in runs.iterdir() if p.is_dir() and not (p / "run.json").exists()] in (
        [],
        [".uploads"],
    )
    small(page, "a red circle")
    page.locator("#gen-start").click()
    finished(page)
    assert len(saved(runs)) == before + 1
    page.close()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"format": "dittools-plan", "version": 1, "rules": [', "damaged or cut short"),
        ('{"format": "dittools-plan", "version": 1, "rules": [], "x": 1}', "unknown keys"),
        ("[" * 60_000, "nested deeper"),
    ],
)
def test_a_broken_plan_is_refused_in_plain_words(
    browser: Any, address: str, tmp_path: Path, content: str, says: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    page = open_page(browser, address)
    page.get_by_label("A plan", exact=True).check()
    page.locator("#gen-upload input[type=file]").set_input_files(path)
    alert = page.locator(".dt-set .dt-alert")
    alert.wait_for()
    assert says in alert.inner_text()
    assert "Traceback" not in page.content()
    page.locator("#gen-start").click()
    page.locator("#gen-status .dt-alert", has_text="No plan is chosen").wait_for()
    page.close()


def test_two_tabs_at_once_keep_their_own_results(browser: Any, address: str, runs: Path) -> None:
    prompts = ("a red circle moving left", "a yellow square moving up")
    pages = [open_page(browser, address) for _ in prompts]
    for seed, (page, prompt) in enumerate(zip(pages, prompts, strict=True)):
        small(page, prompt, seed=seed, steps=20)
    for page in pages:
        page.locator("#gen-start").click()
    pages[1].locator("#gen-status", has_text="Waiting for").wait_for()
    for page, prompt in zip(pages, prompts, strict=True):
        finished(page)
        source = page.locator("#gen-player [data-clip=dense] video").get_attribute("src")
        folder = Path(source).parent.name
        run = json.loads((runs / folder / "run.json").read_text())
        assert run["title"] == prompt
        page.locator("#gen-details summary").click()
        assert prompt in page.locator("#gen-details .dt-code").first.inner_text()
        page.close()


def test_history_survives_a_restart(browser: Any, tmp_path: Path) -> None:
    with studio(tmp_path) as first:
        page = open_page(browser, first)
        small(page, "a green triangle")
        page.locator("#gen-start").click()
        finished(page)
        numbers = page.locator("#gen-details .dt-tiles").inner_text()
        page.close()
    with studio(tmp_path) as second:
        page = open_page(browser, second)
        tab(page, "History")
        page.locator("#history-run input").click()
        page.get_by_role("option", name=re.compile("a green triangle")).click()
        page.locator("#history-player video").first.wait_for()
        assert page.locator("#history-details .dt-tiles").inner_text() == numbers
        with page.expect_download() as download:
            page.locator("#history-details .dt-links a", has_text="plan").first.click()
        assert json.loads(Path(download.value.path()).read_text())["format"] == "dittools-plan"
        shot(page, "history-1280")
        page.close()


def test_narrow_and_dark_pages_fit(browser: Any, address: str) -> None:
    for scheme in ("light", "dark"):
        page = open_page(browser, address, width=390, color_scheme=scheme)
        small(page, "a blue square")
        page.locator("#gen-start").click()
        finished(page)
        for name in ("Generate", "Atlas", "Search", "Compare", "Benchmark", "History"):
            tab(page, name)
            page.wait_for_timeout(200)  # for the tab's own layout to settle before looking
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 390, f"{name} is {wide} pixels wide"
            shot(page, f"{name.lower()}-390-{scheme}")
        page.close()


def test_keyboard_alone_generates(browser: Any, address: str) -> None:
    page = open_page(browser, address)
    small(page, "a red square")
    page.locator("#gen-prompt textarea").focus()
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "gen-start":
            break
    page.keyboard.press("Enter")
    finished(page)
    page.close()


def test_text_stays_text(browser: Any, address: str) -> None:
    page = open_page(browser, address)
    hostile = "a red circle <img src=x onerror=window.hacked=1> ${window.hacked=2} {{model}}"
    small(page, hostile)
    page.locator("#gen-start").click()
    finished(page)
    tab(page, "History")
    page.locator("#history-run input").click()
    page.get_by_role("option").first.click()
    title = page.locator("#history-heading .dt-title")
    title.wait_for()
    assert title.inner_text() == hostile
    assert page.evaluate("window.hacked") is None
    page.close()


def test_only_files_of_the_run_folder_are_served(address: str, runs: Path) -> None:
    def status(path: Path) -> int:
        try:
            with urllib.request.urlopen(f"{address}gradio_api/file={quote(str(path))}") as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    (runs / "seen.txt").write_text("fine")
    (runs.parent / "secret.txt").write_text("no")
    (runs / "link.txt").unlink(missing_ok=True)
    (runs / "link.txt").symlink_to(runs.parent / "secret.txt")
    assert status(runs / "seen.txt") == 200
    for path in (
        ROOT / "README.md",
        ROOT / "app.py",
        runs.parent / "secret.txt",
        Path("/etc/passwd"),
        runs / ".." / "secret.txt",
        runs / "link.txt",
    ):
        assert status(path) == 403, path


def test_a_login_is_asked_for_where_one_is_set(browser: Any, tmp_path: Path) -> None:
    with studio(tmp_path, "--auth", "ann:secret") as guarded:
        page = browser.new_page()
        page.goto(guarded, timeout=PATIENCE_MS)
        page.get_by_label("password").wait_for(timeout=PATIENCE_MS)
        assert page.locator("#gen-start").count() == 0
        page.close()
        try:
            answer = urllib.request.urlopen(f"{guarded}gradio_api/file={tmp_path}/x").status
        except urllib.error.HTTPError as error:
            answer = error.code
        assert answer in (401, 403)


# WCAG 2: relative luminance of what an element shows its text in and stands on, and their ratio
CONTRAST = """
(e) => {
  const numbers = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => numbers(c).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  let below = e;
  const fill = (x) => getComputedStyle(x).backgroundColor;
  while (below.parentElement && numbers(fill(below))[3] === 0) below = below.parentElement;
  const [a, b] = [light(getComputedStyle(e).color), light(fill(below))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser: Any, address: str, scheme: Any) -> None:
    page = open_page(browser, address, color_scheme=scheme)
    places = ["#gen-start", "[role=tab][aria-selected=true]", ".dt-empty", "#dt-brand p"]
    places.append("#dt-model [data-testid=block-info] ~ *")
    found = {place: page.locator(place).first.evaluate(CONTRAST) for place in places}
    assert {place: ratio for place, ratio in found.items() if ratio < 4.5} == {}
    page.close()
