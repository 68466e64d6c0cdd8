"""The studio without a browser: queue, stop, history, memory guard, fields, uploads, safety."""

import json
import shlex
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import dittools
from dittools.cli import main
from dittools.errors import DitToolsError, InputError, PlanError
from dittools.methods import METHODS
from dittools.pipelines.generate import Settings
from dittools.pipelines.session import Request
from dittools.studio import StudioSettings, html, launch, result
from dittools.studio.engine import MOST_WAITING, Cancelled, Engine, Job
from dittools.studio.generation import Generation
from dittools.studio.heatmap import difference
from dittools.studio.memory import check_memory, estimate, filled
from dittools.studio.params import changed, fields_of
from dittools.studio.reproduce import command_line, python_snippet
from dittools.studio.runs import RunStore
from dittools.studio.uploads import MOST_PLAN_BYTES, read_plan

SOON = 60.0  # seconds; machines that test are busy


class Toy:
    """A pipeline with one denoiser that only counts its calls."""

    def __init__(self) -> None:
        self.components = {"transformer": torch.nn.Identity()}

    def set_progress_bar_config(self, **_: Any) -> None:
        pass


def toy_engine() -> Engine:
    return Engine("cpu", loader=lambda name, **_: Toy())


def wait(engine: Engine, job: Job) -> str:
    return list(engine.watch(job, every=SOON))[-1].state


def test_one_job_runs_at_a_time_in_order_of_arrival() -> None:
    engine, running, most, order = toy_engine(), [0], [0], []

    def work(pipe: Any, job: Job) -> int:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.01)
        order.append(job.number)
        running[0] -= 1
        return job.number

    jobs = [engine.submit("x", "toy", work) for _ in range(6)]
    assert [wait(engine, job) for job in jobs] == ["done"] * 6
    assert most[0] == 1
    assert order == [job.number for job in jobs] == [job.result for job in jobs]


def test_a_stop_reaches_a_run_before_its_next_denoiser_call() -> None:
    engine, calls, ready = toy_engine(), [0], threading.Event()

    def work(pipe: Toy, job: Job) -> None:
        while True:  # a pipeline without a step callback: only the denoiser is called
            pipe.components["transformer"](torch.zeros(1))
            calls[0] += 1
            ready.set()

    job = engine.submit("endless", "toy", work)
    assert ready.wait(SOON)
    job.cancel()
    assert wait(engine, job) == "stopped"
    stopped_at = calls[0]
    after = engine.submit("next", "toy", lambda pipe, job: pipe.components["transformer"])
    assert wait(engine, after) == "done"
    assert calls[0] == stopped_at
    assert not after.result._forward_pre_hooks


def test_a_waiting_job_can_be_stopped_and_never_starts() -> None:
    engine, go, started = toy_engine(), threading.Event(), []
    first = engine.submit("first", "toy", lambda pipe, job: go.wait(SOON))
    second = engine.submit("second", "toy", lambda pipe, job: started.append(1))
    assert first.wait(0, SOON)
    assert engine.ahead(second) == 1
    second.cancel()
    go.set()
    assert wait(engine, first) == "done"
    assert wait(engine, second) == "stopped"
    assert started == []


def test_the_queue_is_bounded() -> None:
    engine, go = toy_engine(), threading.Event()
    running = engine.submit("first", "toy", lambda pipe, job: go.wait(SOON))
    while running.state != "running":
        time.sleep(0.001)
    waiting = [engine.submit("x", "toy", lambda pipe, job: None) for _ in range(MOST_WAITING)]
    with pytest.raises(InputError, match="queue is full"):
        engine.submit("one too many", "toy", lambda pipe, job: None)
    go.set()
    assert {wait(engine, job) for job in waiting} == {"done"}


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (InputError("no such size", remedy="a smaller one"), "no such size; try: a smaller one"),
        (RuntimeError("boom\nat line 3"), "RuntimeError: boom at line 3"),
        (MemoryError(), "memory ran out"),
    ],
)
def test_errors_become_one_sentence_and_the_engine_goes_on(error: Exception, says: str) -> None:
    engine = toy_engine()

    def work(pipe: Any, job: Job) -> None:
        raise error

    job = engine.submit("bad", "toy", work)
    shot = list(engine.watch(job, every=SOON))[-1]
    assert shot.state == "failed"
    assert says in shot.error
    assert "\n" not in shot.error
    shown = html.progress(shot).removesuffix("</div>").rpartition(">")[2]
    assert shown[0].isupper()
    assert shown.endswith(".")
    assert wait(engine, engine.submit("good", "toy", lambda pipe, job: None)) == "done"


def test_a_pipeline_without_a_denoiser_fails_in_one_sentence() -> None:
    engine = Engine("cpu", loader=lambda name, **_: Bare())
    job = engine.submit("x", "bare", lambda pipe, job: dittools.attach(pipe, "gna"))
    assert "neither" in list(engine.watch(job, every=SOON))[-1].error
    assert wait(engine, engine.submit("x", "bare", lambda pipe, job: None)) == "done"


class Bare(Toy):
    def __init__(self) -> None:
        self.components = {}


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    index = {"_class_name": ["evil", "Evil"], "transformer": ["evil", "Evil"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    engine = Engine("cpu")
    job = engine.submit("x", str(tmp_path), lambda pipe, job: None)
    assert wait(engine, job) == "failed"
    assert not Path("ran").exists()
    assert not (tmp_path / "ran").exists()


def test_only_one_model_is_kept() -> None:
    alive: list[str] = []

    class Held(Toy):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            alive.append(name)

        def __del__(self) -> None:
            alive.remove(self.name)

    most = [0]

    def load(name: str, **_: Any) -> Held:
        most[0] = max(most[0], len(alive))
        return Held(name)

    engine = Engine("cpu", loader=load)
    for name in ("a", "b", "b"):
        job = engine.submit("x", name, lambda pipe, job: pipe.name)
        assert wait(engine, job) == "done"
        assert job.result == name
    assert alive == ["b"]
    assert most[0] == 0  # the old model is gone before the new one is loaded


def test_progress_tells_share_and_time_left() -> None:
    job = Job("x", "toy", lambda pipe, job: None)
    assert job.begin()
    job("looking ahead", 3, 3)
    job.expect(14)
    for done in (1, 2, 1, 2):  # two runs of one name
        job("warm-up", done, 2)
    job("dense", 2, 4)
    job("accelerated", 1, 6)
    shot = job.snapshot()
    assert shot.share == 0.5
    assert shot.left is not None
    assert "Accelerated" in html.progress(shot)
    assert "1 of 6" in html.progress(shot)
    job.cancel()
    with pytest.raises(Cancelled):
        job("accelerated", 2, 6)


def test_run_ids_never_collide_between_threads(tmp_path: Path) -> None:
    stores = [RunStore(tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda n: stores[n % 4].begin(), range(200)))
    assert len(set(folders)) == 200


def test_history_opens_what_was_finished_and_tells_damage(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    folder = store.begin()
    (folder / "plan.json").write_text("{}")
    assert store.entries() == []  # not finished
    made = store.finish(folder, "search", "a title", {"x": 1}, {"plan": folder / "plan.json"})
    again = RunStore(tmp_path)
    assert again.entries() == [made] == [again.open(made.id)]
    assert again.entries("bench") == []
    assert again.verify(made) == []
    (folder / "plan.json").write_text("{ }")
    assert again.verify(made) == ["plan.json has changed since the run"]
    (folder / "plan.json").unlink()
    assert again.verify(made) == ["plan.json is missing"]
    (folder / "run.json").write_text("{}")
    assert again.entries() == []
    with pytest.raises(InputError, match="damaged"):
        again.open(made.id)


@pytest.mark.parametrize(
    "name", ["../elsewhere", "", ".", "20260101-000000-0000000g", "{absolute}"]
)
def test_history_opens_nothing_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    store, other = RunStore(tmp_path / "runs"), RunStore(tmp_path)
    folder = other.begin()
    other.finish(folder, "search", "x", {}, {})
    for place in (tmp_path / "elsewhere", store.root, store.root / "20260101-000000-0000000g"):
        place.mkdir(exist_ok=True)
        (place / "run.json").write_text((folder / "run.json").read_text())
    with pytest.raises(InputError, match="no such run"):
        store.open(name.format(absolute=folder))


def test_a_run_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    folder = store.begin()
    with pytest.raises(InputError, match="lie in its folder"):
        store.finish(folder, "search", "x", {}, {"plan": tmp_path / "plan.json"})
    made = store.finish(folder, "search", "x", {}, {})
    content = json.loads((folder / "run.json").read_text())
    content["files"] = {"plan": "../../secret"}
    (folder / "run.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="cannot be read"):
        store.open(made.id)


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_of_a_method_is_a_field_with_help(name: str) -> None:
    made = fields_of(name)
    assert [field.name for field in made] == [f.name for f in fields(METHODS[name])]
    assert all(field.help for field in made)
    assert changed(name, [field.default for field in made]) == {}


def test_fields_give_the_parameters_that_differ() -> None:
    names = [field.name for field in fields_of("gna")]
    values: list[Any] = [field.default for field in fields_of("gna")]
    values[names.index("window")] = "full, 0.3, 4"
    values[names.index("block_size")] = 64.0
    assert changed("gna", values) == {"window": ["full", 0.3, 4], "block_size": 64}
    values[names.index("window")] = '["full", 0.3, 4]'
    assert changed("gna", values)["window"] == ["full", 0.3, 4]
    values[names.index("window")] = "nonsense"
    with pytest.raises(DitToolsError, match="window is not usable"):
        changed("gna", values)


def video_pipe() -> Any:
    """A pipeline's facts as large as Wan2.1-14B, without its weights."""
    config = {
        "patch_size": (1, 2, 2), "num_attention_heads": 40, "attention_head_dim": 128,
        "ffn_dim": 13824,
    }  # fmt: skip
    denoiser = SimpleNamespace(config=config, dtype=torch.bfloat16)
    return SimpleNamespace(
        transformer=denoiser, vae=None, vae_scale_factor_temporal=4, vae_scale_factor_spatial=8
    )


def test_the_memory_guard_names_the_largest_size_that_fits() -> None:
    pipe = video_pipe()
    large = Settings("x", frames=81, height=720, width=1280, guidance=5.0)
    room = 8 * 2**30
    with pytest.raises(InputError, match=r"needs about .* GiB") as error:
        check_memory(pipe, large, free=lambda device: room)
    words = str(error.value).rpartition("try: ")[2].split(" or ")
    assert len(words) == 2
    for text in words:
        height, width, frames = (int(t) for t in text.replace(",", "").split() if t.isdigit())
        fits = Settings("x", frames=frames, height=height, width=width, guidance=5.0)
        assert check_memory(pipe, fits, free=lambda device: room).bytes > 0.6 * room
    assert check_memory(pipe, large, free=lambda device: 10 * room) == estimate(pipe, large)


def test_a_size_left_open_counts_as_the_pipelines_own() -> None:
    class Wan:
        transformer = video_pipe().transformer
        vae_scale_factor_temporal, vae_scale_factor_spatial = 4, 8

        def __call__(self, height: int = 480, width: int = 832, num_frames: int = 81) -> None:
            pass

    class Image(Wan):
        default_sample_size = 128

        def __call__(self, height: Any = None, width: Any = None) -> None:
            pass

    found = filled(Wan(), Settings("x", frames=5))
    assert (found.height, found.width, found.frames) == (480, 832, 5)
    assert filled(Image(), Settings("x")).height == 1024
    with pytest.raises(InputError, match="480 x 832 pixels, 81 frames"):
        check_memory(Wan(), Settings("x"), free=lambda device: 2**30)


def test_the_memory_estimate_grows_with_every_side() -> None:
    pipe = video_pipe()
    base = Settings("x", frames=17, height=256, width=256)
    more = [
        Settings("x", frames=33, height=256, width=256),
        Settings("x", frames=17, height=512, width=256),
        Settings("x", frames=17, height=256, width=512),
        Settings("x", frames=17, height=256, width=256, guidance=4.0),
    ]
    assert all(estimate(pipe, m).bytes > 1.5 * estimate(pipe, base).bytes for m in more)


def test_the_decoder_counts_unless_it_works_in_parts() -> None:
    size = Settings("x", frames=64, height=512, width=512)

    class Decoder:
        config = {"block_out_channels": (128, 256)}  # noqa: RUF012
        dtype = torch.float32
        use_tiling = False
        tile_sample_min_height = tile_sample_min_width = 128

    class AutoencoderKLWan(Decoder):
        pass

    pipe = video_pipe()
    pipe.vae = Decoder()
    whole = estimate(pipe, size).decoder
    assert whole > 64 * 512 * 512 * 128 * 4
    pipe.vae.use_tiling = True
    assert estimate(pipe, size).decoder < whole / 8
    pipe.vae = AutoencoderKLWan()
    assert estimate(pipe, size).decoder < whole / 8


def test_the_heat_map_is_dark_where_clips_agree_and_bright_where_not() -> None:
    first = np.full((1, 8, 8, 3), 0.5, np.float32)
    second = first.copy()
    second[0, :4, :, 0] += 0.2
    heat, scale = difference(first, second)
    assert scale == 0.25
    assert heat[0, 7, 7].sum() < 0.1 < 1.5 < heat[0, 0, 0].sum()
    assert difference(first, first)[1] == 0.02


def test_uploads_are_small_plans_and_nothing_else(tmp_path: Path) -> None:
    plan = dittools.Plan.of(dittools.METHODS["gna"]())
    path = plan.save(tmp_path / "mine.json")
    assert read_plan([path]) == plan
    (tmp_path / "other.txt").write_text("x")
    for paths in ([], [path, path], [tmp_path / "other.txt"]):
        with pytest.raises(InputError, match="no plan was uploaded"):
            read_plan(paths)
    (tmp_path / "big.json").write_bytes(b" " * (MOST_PLAN_BYTES + 1))
    with pytest.raises(InputError, match="too large"):
        read_plan([tmp_path / "big.json"])
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(PlanError):
        read_plan([tmp_path / "deep.json"])
    path.write_text(path.read_text()[:50])
    with pytest.raises(PlanError, match=r"^mine\.json is damaged"):
        read_plan([path])


def test_an_uploaded_plan_reads_no_other_file(tmp_path: Path) -> None:
    path = dittools.Plan.of(dittools.METHODS["paro"]()).save(tmp_path / "plan.json")
    content = json.loads(path.read_text())
    content["rules"][0]["params"]["tables"] = "/etc/passwd"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="names a file on the server"):
        read_plan([path])


def test_an_upload_finds_its_tensors_under_the_name_the_plan_gives(tmp_path: Path) -> None:
    plan = dittools.Plan(tensors={"order": torch.arange(4)})
    path = plan.save(tmp_path / "plan.json")
    moved = (tmp_path / "plan.safetensors").rename(tmp_path / "0_plan (1).safetensors")
    assert torch.equal(read_plan([path, moved]).tensors["order"], torch.arange(4))
    with pytest.raises(PlanError, match=r"tensors of plan\.json are missing"):
        read_plan([path])


@pytest.mark.parametrize(
    "options", [{"share": True}, {"host": "0.0.0.0"}, {"host": "192.168.1.4"}, {"host": "example"}]
)
def test_others_are_let_in_only_with_a_login(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="--auth user:password"):
        StudioSettings(**options)
    assert StudioSettings(**options, auth="ann:se:cret").login() == ("ann", "se:cret")
    for broken in ("ann", "ann:", ":secret", ""):
        with pytest.raises(InputError, match="--auth is not usable"):
            StudioSettings(**options, auth=broken)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.9"])
def test_this_machine_needs_no_login(host: str) -> None:
    assert StudioSettings(host=host).login() is None


def test_the_command_refuses_an_open_door(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["studio", "--host", "0.0.0.0"])
    assert left.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_gradio_the_command_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dittools.cli.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as left:
        main(["studio"])
    assert left.value.code == 2
    assert "dittools[app]" in capsys.readouterr().err


def test_a_taken_port_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}.*another --port"):
            launch(StudioSettings(tmp_path, port=port), toy_engine(), block=False)


HOSTILE = "<script>alert(1)</script>\"'&${x}"


class _Tags(HTMLParser):
    """Collects the tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)


def test_every_fragment_escapes_its_text() -> None:
    job = Job("x", "toy", lambda pipe, job: None)
    job.begin()
    job(HOSTILE, 1, 2)
    made = (
        html.alert(HOSTILE),
        html.notice(HOSTILE),
        html.empty(HOSTILE),
        html.table((HOSTILE,), ((HOSTILE,),)),
        html.progress(job.snapshot(), HOSTILE),
        result.player({"dense": f"/runs/{HOSTILE}.mp4"}, HOSTILE, 8),
        result.forecast_card({"error": HOSTILE}),
    )
    assert "<img" in result.player({"dense": "/runs/dense.png"}, "gna", 8)
    for text in made:
        assert "script" not in _Tags(text).tags
        assert HOSTILE not in text


@pytest.fixture(scope="module")
def generated(tmp_path_factory: Any) -> Any:
    """One small generation through the engine, and what was posted on the way."""
    store = RunStore(tmp_path_factory.mktemp("runs"))
    engine = Engine("cpu")
    request = Request(
        prompt="a red circle", steps=2, frames=2, height=32, width=32, guidance=1.0, repeats=1,
        method="gna", params={"window": ["full", 0.5, 0.5]}, seed=3,
    )  # fmt: skip
    work = Generation(request, floors=True, store=store)
    job = engine.submit("x", "demo", work)
    shots = list(engine.watch(job, every=SOON))
    assert shots[-1].state == "done", shots[-1].error
    return SimpleNamespace(store=store, engine=engine, run=job.result, shots=shots, request=request)


def test_a_generation_posts_forecast_clips_and_numbers_on_the_way(generated: Any) -> None:
    posted = generated.shots[-1].posted
    assert list(posted) == ["forecast", "clips", "report"]
    assert posted["report"]["floors"] == {}
    assert set(generated.run.facts["report"]["floors"]) == {"other_seed", "random_blocks"}
    assert generated.store.entries() == [generated.run]
    assert generated.store.verify(generated.run) == []
    assert {"dense", "accelerated", "difference", "plan", "report"} <= set(generated.run.files)
    player, details = result.view(generated.run)
    assert player.count("<video") == 3
    assert "Reproduce this run" in details


def test_the_command_line_of_a_run_makes_the_same_clips(generated: Any, tmp_path: Path) -> None:
    words = shlex.split(command_line(generated.run.facts, None))
    words[words.index("--out") + 1] = str(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(words[1:])
    assert left.value.code == 0
    for name in ("dense.mp4", "accelerated.mp4"):
        assert (tmp_path / name).read_bytes() == (generated.run.folder / name).read_bytes()


def test_the_snippet_of_a_run_makes_the_same_clips(generated: Any, tmp_path: Path) -> None:
    from dittools.pipelines.output import write_clip

    for plan in (None, generated.run.path("plan")):
        names: dict[str, Any] = {}
        exec(python_snippet(generated.run.facts, plan), names)
        for name in ("dense", "accelerated"):
            made = write_clip(tmp_path / f"{name}.mp4", names[name].frames, 8)
            assert made.read_bytes() == (generated.run.folder / f"{name}.mp4").read_bytes()


def test_a_stop_during_the_floors_keeps_the_clips(generated: Any) -> None:
    job: Job

    def work(pipe: Any, running: Job) -> Any:
        post = running.post

        def stop_after(name: str, value: Any) -> None:
            post(name, value)
            if name == "report":
                running.cancel()

        running.post = stop_after  # type: ignore[method-assign]
        return Generation(generated.request, floors=True, store=generated.store)(pipe, running)

    job = generated.engine.submit("x", "demo", work)
    assert wait(generated.engine, job) == "stopped"
    assert job.result.facts["report"]["floors"] == {}
    assert generated.store.verify(job.result) == []


def test_a_stop_before_the_clips_leaves_nothing(generated: Any) -> None:
    before = set(generated.store.root.iterdir())

    def work(pipe: Any, job: Job) -> Any:
        plain = job.__class__.__call__

        class Stopping(Job):
            def __call__(self, what: str, done: int, total: int) -> None:
                if what.startswith("accelerated"):
                    self.cancel()
                plain(self, what, done, total)

        job.__class__ = Stopping
        return Generation(generated.request, floors=False, store=generated.store)(pipe, job)

    job = generated.engine.submit("x", "demo", work)
    assert wait(generated.engine, job) == "stopped"
    assert set(generated.store.root.iterdir()) == before


def test_reproduction_quotes_what_a_shell_would_read() -> None:
    facts = {
        "model": "demo", "settings": Settings("-a 'red' $HOME", seed=-1).to_dict(), "method": None,
        "params": {}, "dense_steps": 0.25, "dense_layers": None, "repeats": 1, "device": "cuda",
        "dtype": "bfloat16",
    }  # fmt: skip
    words = shlex.split(command_line(facts, Path("/x y/plan.json")))
    assert "--prompt=-a 'red' $HOME" in words
    assert "--seed=-1" in words
    assert words[words.index("--plan") + 1] == "/x y/plan.json"
    assert words[words.index("--device") + 1] == "cuda"
    compile(python_snippet(facts, Path("/x y/plan.json")), "snippet", "exec")
