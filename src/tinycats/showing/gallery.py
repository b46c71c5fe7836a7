"""The page of `src/gallery.py`: runs, curves and samples to look at, models to try; it reads, and writes nothing.

It may be on the internet. Whoever asks has to bring the token, if there is one; what a request names is looked up among
what there is, never opened by its name; images are bounded before they are decoded; one request at a time computes, and
a few wait for it.
"""

import asyncio
import base64
import hashlib
import io
import json
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse

from tinycats.run import checkpoints, finished, runs
from tinycats.run.summaries import LocalRuns, Summary, parsed_metrics
from tinycats.script.errors import UserError, one_line
from tinycats.showing import charts

MAX_PHOTO_BYTES = 16 * 2**20
MAX_PHOTO_PIXELS = 50_000_000
MAX_SAMPLES, MAX_STEPS = 8, 100  # of one press of the button
MAX_WAITING = 8  # requests, until one that computes is done
COOKIE = "tinycats"
SAMPLES = "samples"  # a folder of a run

_HERE = Path(__file__).parent
_KINDS = {".css": "text/css", ".js": "text/javascript"}
# Nothing from another host, no script in the page, and no other page may show this one.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

_Result = TypeVar("_Result")


class Queue:
    """Lets one call at a time compute, and a few wait."""

    def __init__(self) -> None:
        self._lock, self._waiting = asyncio.Lock(), 0

    async def run(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """What the function returns, which is called in a thread.

        Raises:
            HTTPException: too many wait already; 503.
        """
        if self._waiting > MAX_WAITING:
            raise HTTPException(503, "too many are waiting; try again in a minute", {"Retry-After": "60"})
        self._waiting += 1
        try:
            async with self._lock:
                return await run_in_threadpool(function, *arguments)
        finally:
            self._waiting -= 1


def app(
    output_dir: Path,
    *,
    token: str | None,
    found: LocalRuns | None = None,
    refresh: Callable[[], None] = lambda: None,
    hosts: frozenset[str] | None = None,
) -> FastAPI:
    """The page and what it asks for.

    Args:
        token: what whoever asks has to bring; None: nothing.
        found: the runs of `output_dir`.
        refresh: called before the runs are listed.
        hosts: the names by which this may be called; None: any. On a laptop another page could else reach it by a name
            of its own (DNS rebinding).
    """
    found = found or LocalRuns(output_dir)
    queue = Queue()
    page = FastAPI(title="tiny-cats", docs_url=None, redoc_url=None, openapi_url=None)

    @page.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        host = urlsplit(f"//{request.headers.get('host', '')}")
        origin = request.headers.get("origin")
        if hosts is not None and host.hostname not in hosts:
            response: Response = Response("unknown host", 421)
        elif request.method != "GET" and origin and urlsplit(origin).netloc != host.netloc:
            response = Response("from another page", 403)
        elif token is not None and not _has_token(request, token):
            response = _asked_for_token(request, token)
        else:
            response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    @page.get("/")
    def index() -> Response:
        return Response((_HERE / "page.html").read_bytes(), media_type="text/html")

    @page.get("/page.{kind}")
    def asset(kind: str) -> Response:
        suffix = f".{kind}"
        if suffix not in _KINDS:
            raise HTTPException(404)
        return Response((_HERE / f"page{suffix}").read_bytes(), media_type=_KINDS[suffix])

    def is_inside(path: Path) -> bool:
        """Whether a path is below the outputs, wherever links lead."""
        return path.resolve().is_relative_to(output_dir.resolve())

    def all_of_them() -> list[Summary]:
        """The runs, the last one first."""
        summaries = [summary for summary in found.summaries() if is_inside(runs.folder_of(output_dir, summary.name))]
        return sorted(summaries, key=lambda summary: -summary.changed)

    def one(name: str) -> Summary:
        """The run of that name, which is one of those that there are."""
        folders = {path.name for path in runs.folder_of(output_dir, "").glob("*/") if is_inside(path)}
        if name not in folders or (summary := found.summary(name)) is None:
            raise HTTPException(404, "there is no such run")
        return summary

    def stored(*parts: str) -> Path:
        """A file below the outputs."""
        path = output_dir.joinpath(*parts)
        if not is_inside(path) or not path.is_file():
            raise HTTPException(404, "there is no such file")
        return path

    def grids(name: str) -> list[str]:
        return sorted(path.stem for path in (runs.folder_of(output_dir, name) / SAMPLES).glob("step_*.png"))

    @page.get("/api/runs")
    def listing(request: Request) -> Response:
        refresh()
        listed = [_in_brief(summary) for summary in all_of_them()]
        return _unless_known(request, json.dumps(listed).encode(), "application/json")

    @page.get("/api/runs/{name}")
    def run(name: str, request: Request) -> Response:
        summary = one(name)
        told = _in_brief(summary) | {
            "options": {key: value for key, value in summary.options.items() if value is not None},
            "resume": found.how_to_resume(summary),
            "samples": grids(name),
            "report": (runs.folder_of(output_dir, name) / runs.REPORT).is_file(),
        }
        return _unless_known(request, json.dumps(told, default=str).encode(), "application/json")

    @page.get("/api/runs/{name}/curves")
    def run_curves(name: str, request: Request) -> Response:
        one(name)
        try:
            metrics = stored("runs", name, runs.METRICS).read_bytes()
        except (HTTPException, OSError):
            metrics = b""
        curves = charts.curves(parsed_metrics(metrics))
        return _unless_known(request, json.dumps(curves).encode(), "application/json")

    @page.get("/api/runs/{name}/samples/{grid}.png")
    def run_samples(name: str, grid: str, request: Request) -> Response:
        one(name)
        if grid not in grids(name):
            raise HTTPException(404, "there is no such grid")
        return _unless_known(request, stored("runs", name, SAMPLES, f"{grid}.png").read_bytes(), "image/png")

    @page.get("/runs/{name}/report.html")
    def run_report(name: str) -> Response:
        one(name)
        return Response(stored("runs", name, runs.REPORT).read_bytes(), media_type="text/html")

    def model_file(kind: str, name: str) -> Path:
        """The finished model of a run, or the last one, where no run is named."""
        if name:
            one(name)
            return stored("runs", name, kind)
        return stored(kind)

    @page.get("/api/models")
    def models() -> dict[str, Any]:
        """What there is to be tried: the runs with a finished classifier or generator, and the classes."""
        answer: dict[str, Any] = {}
        for kind in (finished.CLASSIFIER, finished.GENERATOR):
            files = {"": output_dir / kind}
            files |= {run.name: runs.folder_of(output_dir, run.name) / kind for run in all_of_them()}
            there = {name: _facts(path) for name, path in files.items() if path.is_file()}
            answer[kind] = [{"run": name, "classes": facts.get("classes", [])} for name, facts in there.items()]
        return answer

    @page.post("/api/classify")
    async def classify(request: Request, run: str = "") -> dict[str, Any]:
        """What the photo shows whose bytes are the request's body."""
        path = await run_in_threadpool(model_file, finished.CLASSIFIER, run)
        photo = await _body(request)
        return await queue.run(_classified, path, photo)

    @page.post("/api/sample")
    async def sample(request: Request, run: str = "") -> dict[str, Any]:
        """Images as PNG, base64; the request is {"class": …, "count": …, "seed": …, "steps": …}."""
        path = await run_in_threadpool(model_file, finished.GENERATOR, run)
        try:
            asked = json.loads(await _body(request))
            name, count, seed, steps = str(asked["class"]), int(asked["count"]), int(asked["seed"]), int(asked["steps"])
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise HTTPException(400, "what is asked for is not understood") from error
        if not (1 <= count <= MAX_SAMPLES and 0 <= seed < 2**63 and 2 <= steps <= MAX_STEPS):
            raise HTTPException(400, f"at most {MAX_SAMPLES} images, and {MAX_STEPS} steps")
        return {"images": await queue.run(_sampled, path, name, count, seed, steps)}

    return page


# --- who may come in ---------------------------------------------------------------------------------------------


def _has_token(request: Request, token: str) -> bool:
    brought = request.headers.get("authorization", "").removeprefix("Bearer ") or request.cookies.get(COOKIE, "")
    return secrets.compare_digest(brought.encode("utf-8", "replace"), token.encode())


def _asked_for_token(request: Request, token: str) -> Response:
    """The token in the address, as the command prints it, becomes a cookie; without one nothing is told."""
    brought = request.query_params.get("token", "")
    if request.method == "GET" and secrets.compare_digest(brought.encode("utf-8", "replace"), token.encode()):
        response: Response = RedirectResponse(request.url.path, 303)
        secure = request.headers.get("x-forwarded-proto", request.url.scheme) == "https"
        response.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=secure, max_age=30 * 86400)
        return response
    text = (
        "This page is for those who have its address with the token: <code>modal run src/gallery.py</code> prints it."
    )
    return Response(f"<!doctype html><title>tiny-cats</title><p>{text}", 401, media_type="text/html")


# --- what is asked for -------------------------------------------------------------------------------------------


def _in_brief(summary: Summary) -> dict[str, Any]:
    """What the page's list has of a run."""
    return {
        "name": summary.name,
        "script": summary.script,
        "state": summary.state,
        "step": summary.step,
        "steps": summary.steps,
        "best": summary.best and {"metric": summary.best[0], "value": summary.best[1]},
        "changed": summary.changed,
    }


async def _body(request: Request) -> bytes:
    """The request's body.

    Raises:
        HTTPException: it is too large; 413. No more than that is kept in memory, whatever its header says.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_PHOTO_BYTES:
            raise HTTPException(413, f"more than {MAX_PHOTO_BYTES // 2**20} MB")
    return bytes(body)


def _unless_known(request: Request, body: bytes, kind: str) -> Response:
    """The body, unless whoever asks has it."""
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={"ETag": tag})
    return Response(body, media_type=kind, headers={"ETag": tag})


def _facts(model: Path) -> dict[str, Any]:
    try:
        return json.loads(model.with_suffix(checkpoints.FACTS).read_bytes())
    except (OSError, ValueError):
        return {}


def _model(load: Callable[[Path], Any], path: Path) -> Any:
    try:
        return finished.loaded(load, path)
    except (UserError, OSError) as error:
        raise HTTPException(409, one_line(str(error))) from error


def _classified(path: Path, photo: bytes) -> dict[str, Any]:
    from PIL import Image

    from tinycats import classifier

    model = _model(classifier.load, path)
    try:
        with Image.open(io.BytesIO(photo)) as image:
            if image.width * image.height > MAX_PHOTO_PIXELS:
                raise HTTPException(413, f"more than {MAX_PHOTO_PIXELS // 10**6} million pixels")
        pixels = model.read(io.BytesIO(photo))
    except HTTPException:
        raise
    except Exception as error:  # a broken file makes Pillow's plugins raise whatever they like
        raise HTTPException(415, "this is no image that can be read") from error
    (probabilities,) = model.classify([pixels])
    return {"classes": sorted(probabilities.items(), key=lambda item: -item[1])}


def _sampled(path: Path, name: str, count: int, seed: int, steps: int) -> list[str]:
    from tinycats import generator

    model = _model(generator.load, path)
    if name not in model.classes:
        raise HTTPException(400, "there is no such class")
    images = model.sample([name] * count, seed=seed, numbers=model.noise_numbers(name, count), steps=steps)
    return [base64.b64encode(generator.png(image)).decode() for image in images]
