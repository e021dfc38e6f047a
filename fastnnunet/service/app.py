"""The addresses of the service. Every refusal is `{"error": one sentence}`; what they act on is in `service`."""

import asyncio
import json
import mimetypes
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from fastnnunet.service import monai
from fastnnunet.service.answers import ANSWERS, USUAL, check_answers
from fastnnunet.service.guard import Guard
from fastnnunet.service.jobs import OVER, Job
from fastnnunet.service.models import ModelCard
from fastnnunet.service.refusals import RefusedError
from fastnnunet.service.service import Service, refuse_unfinished
from fastnnunet.version import __version__

PAGE_FOLDER = Path(__file__).with_name("page")
_TYPES = {".wasm": "application/wasm", ".mjs": "text/javascript", ".js": "text/javascript", ".css": "text/css"}
_LOOK_S, _ALIVE_S = 0.1, 15.0
_AT_ONCE = 1 << 20  # bytes of a result that is read before any of it is sent
_GONE_S = 0.5  # how often a client that waits is looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBody:
    """Why there is no answer."""

    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The service answers."""

    status: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Whether a request would be taken on now."""

    ready: bool
    loaded: tuple[str, ...]
    waiting: int
    running: int
    most_waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """All models."""

    models: tuple[ModelCard, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """A job as its client sees it. Times in seconds; `created` and `over` since 1970, `kept_until` too.

    `series`: of a job that failed since its zip holds several, what each is, by its SeriesInstanceUID.
    """

    id: str
    model: str
    answers: tuple[str, ...]
    state: str
    created: float
    over: float | None
    kept_until: float | None
    status: int
    error: str
    media_type: str
    times_s: dict[str, float]
    series: dict[str, str]


def _refused(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


_ALWAYS = (400, 401, 403, 421)
_UPLOAD = (*_ALWAYS, 404, 408, 413, 415, 422, 500, 503, 504, 507)
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_RESULT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "What was asked for: one file, or a zip of several",
        "content": {"application/octet-stream": _BYTES},
    }
}
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": {"type": "array", "minItems": 1, "items": _BYTES["schema"]}},
                }
            },
            "application/octet-stream": _BYTES,
        },
    }
}
_Answers = Annotated[
    list[str],
    Query(
        alias="answer",
        description="Formats; a zip where there are several.",
        json_schema_extra={"items": {"type": "string", "enum": sorted(ANSWERS)}, "minItems": 1},
    ),
]
_USUAL = [USUAL]
_More = Annotated[
    list[str],
    Query(
        alias="answer",
        description="Formats in place of those that the job was made with; nothing is predicted for them.",
        json_schema_extra={"items": {"type": "string", "enum": sorted(ANSWERS)}},
    ),
]
_AS_ASKED: list[str] = []
_Series = Annotated[
    str | None,
    Query(description="SeriesInstanceUID, where a zip holds several series.", pattern=r"^[0-9.]{1,64}$"),
]


def create_app(service: Service, token: str | None = None) -> Guard:
    """The ASGI application; `service` must have been entered."""
    app = FastAPI(
        title="FastnnUNet", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json",
        redirect_slashes=False, dependencies=[Depends(_refuse_unknown)],
    )  # fmt: skip
    _add_refusals(app)
    _add_models(app, service)
    _add_jobs(app, service)
    monai.add(app, service, _refused(*_UPLOAD), finished)
    _add_page(app)
    return Guard(app, spec=service.spec, token=token)


async def _refuse_unknown(request: Request) -> None:
    """Raises RefusedError for a name in the query that the address does not have."""
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    if unknown := sorted(set(request.query_params) - known):
        there = f"there are {', '.join(sorted(known))}" if known else "this address has none"
        raise RefusedError(400, f"no such parameter: {', '.join(map(repr, unknown))[:200]}; {there}")


def _add_refusals(app: FastAPI) -> None:
    @app.exception_handler(RefusedError)
    async def refused(_request: Request, e: RefusedError) -> JSONResponse:
        headers = {} if e.retry_after_s is None else {"Retry-After": str(e.retry_after_s)}
        return JSONResponse({"error": e.sentence}, e.status, headers)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, e: HTTPException) -> JSONResponse:
        sentences = {
            404: "no such address; GET /openapi.json lists them all",
            405: f"this address does not take {request.method}, expected {(e.headers or {}).get('Allow')}",
        }
        return JSONResponse({"error": sentences.get(e.status_code, str(e.detail))}, e.status_code, e.headers)

    @app.exception_handler(Exception)  # which `guard` logs
    async def failed(_request: Request, _e: Exception) -> JSONResponse:
        return JSONResponse({"error": "the service failed; its log says more"}, 500)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, e: RequestValidationError) -> JSONResponse:
        problems = [f"{'.'.join(map(str, p['loc'][1:])) or p['loc'][0]}: {p['msg']}" for p in e.errors()]
        return JSONResponse({"error": "; ".join(problems)}, 422)


def _add_models(app: FastAPI, service: Service) -> None:
    served = service.served

    def described(name: str) -> ModelCard:
        return replace(served.models[served.require(name)], loaded=name in service.loaded)

    @app.head("/health", include_in_schema=False)  # as load balancers ask
    @app.get("/health", responses=_refused(*_ALWAYS))
    async def health() -> Health:
        """The service answers."""
        return Health(status="ok", version=__version__)

    @app.get("/ready", responses={503: {"model": Ready}, **_refused(*_ALWAYS)})
    async def ready() -> JSONResponse:
        """Whether a request would be taken on now."""
        waiting = len(service.waiting)
        state = Ready(
            ready=waiting < service.waiting.most,
            loaded=tuple(sorted(service.loaded)),
            waiting=waiting,
            running=service.running,
            most_waiting=service.waiting.most,
        )
        return JSONResponse(asdict(state), 200 if state.ready else 503)

    @app.get("/models", responses=_refused(*_ALWAYS))
    async def models() -> Models:
        """What can be predicted, from what."""
        return Models(models=tuple(described(name) for name in served.models))

    @app.get("/models/{model}", responses=_refused(*_ALWAYS, 404))
    async def one_model(model: str) -> ModelCard:
        """One of them."""
        return described(model)


async def finished(service: Service, job: Job, request: Request) -> None:
    """Wait for a job; it is cancelled when its client is gone. Raises RefusedError where there is no result."""
    waited = asyncio.wrap_future(job.finished)
    try:
        while not waited.done():
            await asyncio.wait([waited], timeout=_GONE_S)
            if not waited.done() and await request.is_disconnected():
                service.cancel(job)
        refuse_unfinished(job)
    except BaseException:
        service.cancel(job)
        if job.state in OVER:
            service.store.remove(job)
        raise


async def _result(job: Job, done: BackgroundTask | None = None) -> Response:
    assert job.result is not None
    timing = ", ".join(f"{name};dur={1e3 * seconds:.2f}" for name, seconds in job.times_s.items())
    headers = {"Server-Timing": timing}
    if job.result.stat().st_size <= _AT_ONCE:  # a file response takes five turns of other threads
        content = await run_in_threadpool(job.result.read_bytes)
        headers["Content-Disposition"] = f'attachment; filename="{job.result.name}"'
        return Response(content, media_type=job.media_type, headers=headers, background=done)
    return FileResponse(
        job.result, media_type=job.media_type, filename=job.result.name, headers=headers, background=done
    )


def _state(job: Job, service: Service) -> JobState:
    names = ("id", "model", "answers", "state", "created", "over", "status", "error", "media_type", "times_s")
    return JobState(
        **{name: getattr(job, name) for name in names},
        series=dict(job.series),
        kept_until=None if job.over is None else job.over + service.spec.keep_s,
    )


def _add_jobs(app: FastAPI, service: Service) -> None:
    store = service.store

    def chosen(model: str, answers: list[str]) -> tuple[str, ...]:
        return check_answers(answers, service.served.models[service.served.require(model)].answers)

    @app.post(
        "/models/{model}/predict",
        responses={**_RESULT, **_refused(*_UPLOAD)},
        response_class=FileResponse,
        openapi_extra=_BODY,
    )
    async def predict(
        request: Request,
        model: str,
        answers: _Answers = _USUAL,
        series: _Series = None,
    ) -> Response:
        """Predict an image and wait for the result."""
        job = await service.take_on(request, model, chosen(model, answers), is_kept=False, series_uid=series)
        await finished(service, job, request)
        return await _result(job, BackgroundTask(store.remove, job))

    @app.post("/models/{model}/jobs", status_code=202, responses=_refused(*_UPLOAD), openapi_extra=_BODY)
    async def new_job(
        request: Request,
        model: str,
        answers: _Answers = _USUAL,
        series: _Series = None,
    ) -> JobState:
        """Predict an image and come back for the result."""
        job = await service.take_on(request, model, chosen(model, answers), is_kept=True, series_uid=series)
        return _state(job, service)

    @app.get("/jobs/{job}", responses=_refused(*_ALWAYS, 404, 410))
    async def job_state(job: str) -> JobState:
        """How a job goes. 410 for one that was lost when the service ended."""
        found = store.get(job)
        if found.state == "lost":
            raise RefusedError(410, f"lost: {found.error}")
        return _state(found, service)

    @app.delete("/jobs/{job}", responses=_refused(*_ALWAYS, 404))
    async def delete_job(job: str) -> JobState:
        """Cancel a job; one that is over is forgotten with its result."""
        found = store.get(job)
        if found.state in OVER:
            state = _state(found, service)
            store.remove(found)
            return state
        service.cancel(found)
        return _state(found, service)

    @app.get(
        "/jobs/{job}/result",
        responses={**_RESULT, **_refused(*_ALWAYS, 404, 408, 409, 410, 413, 415, 422, 500, 503, 504, 507)},
        response_class=FileResponse,
    )
    async def job_result(request: Request, job: str, answers: _More = _AS_ASKED) -> Response:
        """The result of a job that is done: as it was asked for, or other answers of what was predicted then."""
        found = store.get(job)
        refuse_unfinished(found)
        if not answers or chosen(found.model, answers) == found.answers:
            return await _result(found)
        more = service.take_on_more(found, chosen(found.model, answers))
        try:
            await finished(service, more, request)
        except RefusedError:
            store.get(job)  # which says so where it was forgotten meanwhile
            raise
        return await _result(more, BackgroundTask(store.remove, more))

    @app.get(
        "/jobs/{job}/events",
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}, **_refused(*_ALWAYS, 404)},
        response_class=StreamingResponse,
    )
    async def job_events(job: str) -> StreamingResponse:
        """What a job says while it runs, as server-sent events; ends with the job."""
        return StreamingResponse(_stream(store.get(job)), media_type="text/event-stream")


async def _stream(job: Job) -> AsyncIterator[str]:
    next_event, silent_s = 0, 0.0
    while True:
        is_over = job.finished.done()  # before the events are looked at: the last one is among them
        events = list(job.events)
        for event in events:
            if event["number"] >= next_event:
                yield f"id: {event['number']}\nevent: {event['kind']}\ndata: {json.dumps(event)}\n\n"
                next_event, silent_s = event["number"] + 1, 0.0
        if is_over:
            if not events:  # of an earlier service: its events are gone
                last = {"kind": "state", "state": job.state, "status": job.status, "error": job.error}
                yield f"event: state\ndata: {json.dumps(last)}\n\n"
            return
        await asyncio.sleep(_LOOK_S)
        silent_s += _LOOK_S
        if silent_s >= _ALIVE_S:
            silent_s = 0.0
            yield ": alive\n\n"


def _add_page(app: FastAPI) -> None:
    for ending, kind in _TYPES.items():
        mimetypes.add_type(kind, ending)
    index = PAGE_FOLDER / "index.html"
    if index.is_file():

        @app.get("/", include_in_schema=False)
        async def page() -> FileResponse:
            return FileResponse(index, media_type="text/html; charset=utf-8")

        app.mount("/page", StaticFiles(directory=PAGE_FOLDER))
