"""The gallery's page, asked over HTTP and looked at in a browser."""

import contextlib
import json
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

import gallery as script
from conftest import REPOSITORY, script_process, untrained_generator
from tinycats.showing import charts, gallery

SMALL_DIT = ("--image-size", "32", "--patch-size", "8", "--dim", "64", "--depth", "2", "--heads", "2")
SMALL_DIT += ("--batch-size", "8", "--sample-steps", "3", "--save-every", "1e-9")
TOKEN = "a-token"


@pytest.fixture
def outputs(smoke, tmp_path) -> Path:
    """An output folder with a finished classifier's run, a run of nothing, and an untrained generator."""
    shutil.copytree(smoke / "outputs", tmp_path / "outputs")
    untrained_generator(tmp_path / "outputs" / "tiny_dit.pt")
    begun = tmp_path / "outputs" / "runs" / "begun"
    (begun / "samples").mkdir(parents=True)
    (begun / "run.json").write_text(json.dumps({"script": "train_dit.py", "options": {"seed": 3}, "steps": 100}))
    for step in (10, 20):
        Image.new("RGB", (20, 10), (step, 0, 0)).save(begun / "samples" / f"step_{step:07}.png")
    return tmp_path / "outputs"


@contextlib.contextmanager
def served(output_dir: Path, **options) -> Iterator[str]:
    """The page's address."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        options = {"token": None, "hosts": frozenset(["127.0.0.1"])} | options
        server = uvicorn.Server(uvicorn.Config(gallery.app(output_dir, **options), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def answer(address: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Status and body of a GET, or of a POST of that body; redirections are not followed."""

    class Stays(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_):
            return None

    request = urllib.request.Request(address, body, {name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.build_opener(Stays).open(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def image_file(side: int, kind: str = "png") -> bytes:
    file = BytesIO()
    Image.new("RGB", (side, side)).save(file, kind)
    return file.getvalue()


# --- who may come in, and to what --------------------------------------------------------------------------------


def test_nobody_gets_in_without_the_token(outputs):
    with served(outputs, token=TOKEN, hosts=None) as address:
        for path in (
            "/",
            "/page.js",
            "/api/runs",
            "/api/models",
            "/api/runs/begun",
            "/nothing",
            "/?token=",
            "/?token=é",
        ):
            assert answer(address + path.replace("é", "%C3%A9"))[0] == 401
        for headers in ({"Authorization": "Bearer a-tokem"}, {"Cookie": "tinycats="}, {"Cookie": "tinycats=a-toke"}):
            assert answer(f"{address}/api/runs", **headers)[0] == 401
        for path, body in (
            ("/api/classify", image_file(40)),
            ("/api/sample", b"{}"),
            (f"/api/classify?token={TOKEN}", b""),
        ):
            assert answer(address + path, body)[0] == 401
        for headers in ({"Authorization": f"Bearer {TOKEN}"}, {"Cookie": f"tinycats={TOKEN}"}):
            assert answer(f"{address}/api/runs", **headers)[0] == 200
        assert answer(f"{address}/?token={TOKEN}")[0] == 303


@pytest.mark.parametrize("secure", [False, True])
def test_the_token_in_the_address_becomes_a_cookie_that_scripts_and_other_pages_do_not_get(outputs, secure):
    class Stays(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_):
            return None

    with served(outputs, token=TOKEN) as address:
        headers = {"X-Forwarded-Proto": "https"} if secure else {}
        with pytest.raises(urllib.error.HTTPError) as redirection:
            urllib.request.build_opener(Stays).open(urllib.request.Request(f"{address}/?token={TOKEN}", None, headers))
        cookie = redirection.value.headers["Set-Cookie"]
        assert redirection.value.headers["Location"] == "/", "the token is not left in the address"
        assert cookie.startswith(f"tinycats={TOKEN}; HttpOnly;")
        assert "SameSite=strict" in cookie
        assert ("Secure" in cookie) == secure


def test_nothing_outside_the_outputs_can_be_named(outputs, tmp_path):
    (tmp_path / "secret").mkdir()
    for name in ("run.json", "metrics.jsonl", "report.html", "state.pt"):
        (tmp_path / "secret" / name).write_text("{}")
    (outputs / "runs" / "link").symlink_to(tmp_path / "secret")
    (outputs / "runs" / "begun" / "report.html").symlink_to(tmp_path / "secret" / "report.html")
    (outputs / "runs" / "begun" / "samples" / "step_0000030.png").symlink_to("/etc/passwd")
    with served(outputs) as address:
        for name in ("..", "../..", "%2e%2e", "..%2f..%2fsecret", "%2fetc", ".", "begun%00", "link"):
            for rest in ("", "/curves", "/samples/step_0000010.png"):
                assert answer(f"{address}/api/runs/{name}{rest}")[0] == 404
        listed = json.loads(answer(f"{address}/api/runs")[1])
        assert "link" not in [run["name"] for run in listed]
        for name in ("link", "begun", "..", "%2e%2e%2fsecret"):
            assert answer(f"{address}/runs/{name}/report.html")[0] == 404
        for grid in ("..%2frun", "step_0000030", "..%2f..%2f..%2fsecret%2frun", "step_0000011"):
            assert answer(f"{address}/api/runs/begun/samples/{grid}.png")[0] == 404
        assert answer(f"{address}/api/runs/begun/samples/step_0000010.png")[0] == 200
        for run in ("../../secret", "..", "link", "nothing", "/etc"):
            assert answer(f"{address}/api/classify?run={run}", image_file(40))[0] == 404
        for kind in ("html", "py", "..%2fgallery.py", "css%00"):
            assert answer(f"{address}/page.{kind}")[0] == 404


def test_no_request_writes_or_stops_anything(outputs):
    before = {path: path.read_bytes() for path in outputs.rglob("*") if path.is_file() and path.name != ".lock"}
    with served(outputs) as address:
        for method in ("PUT", "DELETE", "PATCH", "POST"):
            for path in ("/", "/api/runs", "/api/runs/begun", "/api/models", "/api/runs/begun/curves"):
                request = urllib.request.Request(address + path, b"{}", method=method)
                with pytest.raises(urllib.error.HTTPError) as refused:
                    urllib.request.urlopen(request)
                assert refused.value.code == 405
        answer(f"{address}/api/runs")
        answer(f"{address}/api/sample", b'{"class": "tabby", "count": 1, "seed": 0, "steps": 2}')
    after = {path: path.read_bytes() for path in outputs.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


def test_on_a_laptop_other_pages_cannot_reach_it_under_a_name_of_their_own_nor_make_it_compute(outputs):
    with served(outputs) as address:
        port = address.rpartition(":")[2]
        assert answer(address, Host=f"rebound.example:{port}")[0] == 421
        assert answer(f"{address}/api/classify", image_file(40), Origin="https://elsewhere.example")[0] == 403
        assert answer(f"{address}/api/classify", image_file(40), Origin=address)[0] == 200


# --- what is asked for -------------------------------------------------------------------------------------------


def test_uploads_are_bounded_in_size_and_pixels_and_what_is_no_image_is_refused(outputs, monkeypatch):
    monkeypatch.setattr(gallery, "MAX_PHOTO_BYTES", 2**20)
    monkeypatch.setattr(gallery, "MAX_PHOTO_PIXELS", 1_000_000)
    with served(outputs) as address:
        ask = f"{address}/api/classify"
        assert answer(ask, image_file(1000))[0] == 200
        assert answer(ask, image_file(1001)) == (413, b'{"detail":"more than 1 million pixels"}')
        assert answer(ask, bytes(2**20 + 1)) == (413, b'{"detail":"more than 1 MB"}')
        for photo in (
            b"",
            b"no image",
            image_file(100)[:60],
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            image_file(4),
        ):
            assert answer(ask, photo) == (415, b'{"detail":"this is no image that can be read"}')
        status, body = answer(ask, image_file(60, "gif"))
        assert status == 200
        assert sum(share for _, share in json.loads(body)["classes"]) == pytest.approx(1)


def test_what_is_sampled_is_what_the_script_samples_and_bounded(outputs, monkeypatch):
    with served(outputs) as address:
        ask = f"{address}/api/sample"
        status, body = answer(ask, json.dumps({"class": "tabby", "count": 2, "seed": 5, "steps": 3}).encode())
        assert status == 200
        import sample
        from tinycats import generator

        model = generator.load(outputs / "tiny_dit.pt")
        expected = dict(sample.png_files(model, ["tabby"], 2, 5, None, 3, 16))
        import base64

        assert [base64.b64decode(image) for image in json.loads(body)["images"]] == list(expected.values())[:2]
        good = {"class": "tabby", "count": 1, "seed": 0, "steps": 2}
        for wrong in (
            {"class": "lion"},
            {"count": 0},
            {"count": 9},
            {"count": "many"},
            {"seed": -1},
            {"seed": 2**64},
            {"steps": 1},
            {"steps": 101},
            {"steps": float("inf")},
            {"count": None},
        ):
            assert answer(ask, json.dumps(good | wrong).encode())[0] == 400
        for body in (b"", b"{", b"[]", b"1", b"\xff", b'{"class": "tabby"}'):
            assert answer(ask, body)[0] == 400
        (outputs / "tiny_dit.pt").write_bytes(b"damaged")
        assert answer(ask, json.dumps(good).encode())[0] == 409


def test_many_requests_at_once_wait_their_turn_and_too_many_are_sent_away(outputs, monkeypatch):
    running, most, entered = 0, 0, threading.Lock()

    def slow(_path: Path, photo: bytes) -> dict:
        nonlocal running, most
        with entered:
            running += 1
            most = max(most, running)
        time.sleep(0.3)
        with entered:
            running -= 1
        return {"classes": []}

    monkeypatch.setattr(gallery, "_classified", slow)
    monkeypatch.setattr(gallery, "MAX_WAITING", 3)
    statuses: list[int] = []
    with served(outputs) as address:
        threads = [
            threading.Thread(target=lambda: statuses.append(answer(f"{address}/api/classify", b"x")[0]))
            for _ in range(9)
        ]
        for thread in threads:
            thread.start()
        assert answer(f"{address}/api/runs")[0] == 200, "looking is not held up"
        for thread in threads:
            thread.join()
    assert most == 1
    assert sorted(statuses) == [200] * 4 + [503] * 5


def test_what_has_not_changed_is_not_sent_again(outputs):
    with served(outputs) as address, urllib.request.urlopen(f"{address}/api/runs") as response:
        assert answer(f"{address}/api/runs", If_None_Match=response.headers["ETag"])[0] == 304
        (outputs / "runs" / "begun" / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n')
        assert answer(f"{address}/api/runs", If_None_Match=response.headers["ETag"])[0] == 200


def test_curves_are_svg_that_can_be_read_aloud_and_none_is_drawn_of_nothing():
    rows = [{"step": step, "loss": 1 / step, "lr": float("nan")} for step in range(1, 2000)]
    drawn = charts.curves([*rows, {"step": 2000, "val_accuracy": 0.5}])
    assert list(drawn) == ["Loss", "Accuracy", "Learning rate"]
    assert "<desc>loss 0.0005003 at step 1999</desc>" in drawn["Loss"]
    assert drawn["Loss"].count(" ") < 3000, "thinned out"
    assert "<circle" in drawn["Accuracy"], "a single point is seen"
    assert charts.curves([]) == {}
    assert "nan" not in "".join(drawn.values())
    for low, high in ((0.5, 0.5), (0.98, 0.9800000000000001), (0, 0), (-3, -3), (0, 1e-9), (1, 200_000)):
        ticks = charts._ticks(low, high)
        assert ticks[0] <= low <= high <= ticks[-1]
        assert len(set(ticks)) == len(ticks) <= 9


# --- in a browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    executable = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator[Page]:
    """A page in which nothing may go wrong, and which may ask nothing of another host."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on(
        "request",
        lambda request: problems.append(request.url)
        if "//127.0.0.1" not in request.url[:20] and not request.url.startswith(("data:", "blob:"))
        else None,
    )
    yield page
    page.close()
    assert problems == []


@contextlib.contextmanager
def shown(page: Page, output_dir: Path) -> Iterator[None]:
    """The page is open; it is left before its server ends, of which it asks something every few seconds."""
    with served(output_dir) as address:
        page.goto(address)
        yield
        page.goto("about:blank")


@pytest.mark.slow
def test_a_run_is_followed_live_a_grid_slid_through_a_photo_classified_and_a_cat_sampled(
    page, outputs, smoke, tmp_path
):
    shutil.copytree(smoke / "data", tmp_path / "data")
    arguments = ("data/toy", *SMALL_DIT, "--steps", "60", "--sample-every", "10", "--run", "live")
    training = script_process("train_dit.py", *arguments, cwd=tmp_path)
    with shown(page, outputs):
        run = page.get_by_role("button", name="live")
        run.click(timeout=60_000)
        expect(page.locator("#run-state")).to_contain_text("train_dit.py")
        expect(page.locator("#run-state")).to_contain_text("step 60 of 60", timeout=60_000)
        assert training.wait(timeout=100) == 0, training.stderr.read()
        expect(page.locator("#run-state")).to_contain_text("finished", timeout=20_000)
        expect(page.get_by_role("img", name="Loss over the steps")).to_be_visible()

        slider = page.get_by_label("After step")
        expect(page.locator("#grid")).to_have_attribute("alt", "Samples of live after step 60: a row for each class")
        slider.focus()
        page.keyboard.press("Home")
        expect(page.locator("#step-number")).to_have_text("10")
        assert page.evaluate("document.getElementById('grid').decode().then(() => true)")
        expect(page.locator("#grid")).to_have_attribute("src", "api/runs/live/samples/step_0000010.png")

        page.set_input_files("#photo", smoke / "data/toy/val/black/000.png")
        expect(page.locator("#answer li").first).to_contain_text("black", timeout=30_000)


def test_keyboard_and_a_narrow_window_are_enough(page, outputs):
    page.set_viewport_size({"width": 360, "height": 740})
    with shown(page, outputs):
        page.get_by_role("button", name="begun").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#run-state")).to_contain_text("interrupted")
        expect(page.locator("#run-resume")).to_contain_text("python src/train_dit.py --resume")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing sticks out"
        page.locator("#seed").fill("7")
        page.locator("#count").fill("2")
        page.locator("#steps").fill("3")
        page.keyboard.press("Enter")
        expect(page.locator("#sampled img")).to_have_count(2, timeout=30_000)
        assert page.locator("#sampled img").first.get_attribute("alt") == "black, seed 7, number 1"
        assert page.locator("img:not([alt])").count() == 0
        focusable = page.locator("button:visible, input:visible, select:visible, summary:visible, a:visible").count()
        page.evaluate("document.activeElement.blur()")
        reached = set()
        for _ in range(focusable + 2):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        assert len(reached - {""}) >= focusable - 1, "all of it is reached by the Tab key"


# --- the script --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_a_laptop_it_listens_for_this_machine_alone_until_it_is_stopped(outputs):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = script_process("gallery.py", "--port", port, cwd=outputs.parent)
    assert f"on http://127.0.0.1:{port}; Ctrl-C ends it" in process.stdout.readline()
    assert answer(f"http://127.0.0.1:{port}/api/runs")[0] == 200
    taken = script_process("gallery.py", "--port", port, cwd=outputs.parent)
    assert taken.communicate(timeout=60)[1] == f"error: --port {port}: address already in use; choose another\n"
    assert taken.returncode == 1
    process.terminate()
    assert (process.wait(timeout=60), process.stderr.read()) == (143, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--port", "0"], "--port: 0 is out of range"), (["--output-dir", "/etc/passwd"], "/etc/passwd is not a folder")],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.PARSER.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_deployed_it_reads_the_volume_and_its_address_has_the_token(modal_cloud, tmp_path):
    """As far as the stand-in goes: it has no web endpoints, so that the page itself is asked on this machine only."""
    path = REPOSITORY / "src" / "gallery.py"
    served = modal_cloud.run("modal", "serve", path, "--timeout", "1", cwd=tmp_path)
    assert served.status == 0 and "Serving" in served.stdout, served.output
    before = modal_cloud.run("modal", "run", path, cwd=tmp_path)
    assert (before.status, before.stderr) == (1, "error: the gallery is not deployed: modal deploy src/gallery.py\n")
    deployed = modal_cloud.run("modal", "deploy", path, cwd=tmp_path)
    assert deployed.status == 0, deployed.output
    web = modal_cloud.functions[-1].definition
    (mount,) = web.volume_mounts
    assert (mount.mount_path, mount.read_only) == ("/outputs", True)
    assert web.webhook_config.type
    assert web.resources.gpu_config.count == 0
    addresses = [modal_cloud.run("modal", "run", "-q", path, cwd=tmp_path).stdout.strip() for _ in range(2)]
    assert addresses[0] == addresses[1]
    assert len(addresses[0].partition("?token=")[2]) == 32
    assert modal_cloud.missing == []
