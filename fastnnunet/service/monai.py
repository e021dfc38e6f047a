"""The two addresses that clients of MONAI Label need to predict: `GET /info/` and `POST /infer/{model}`.

Images are sent with the request: there is no data store here, so `image` and `session_id` name nothing.
"""

import json
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from fastnnunet.errors import CorruptError
from fastnnunet.service.answers import USUAL
from fastnnunet.service.refusals import RefusedError
from fastnnunet.specs.checks.json_text import parse_json
from fastnnunet.version import __version__

if TYPE_CHECKING:
    from fastnnunet.service.jobs import Job
    from fastnnunet.service.models import ModelCard
    from fastnnunet.service.service import Service

Finished = Callable[["Service", "Job", Request], Awaitable[None]]
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "params": {"type": "string", "default": "{}"},
                    },
                }
            }
        },
    }
}


def add(app: FastAPI, service: "Service", refused: dict[int | str, dict[str, Any]], finished: Finished) -> None:
    """Add both to an application; `finished` waits for a job."""

    @app.get("/info/", responses={status: refused[status] for status in (400, 401, 403, 421)})
    async def info() -> dict[str, Any]:
        """What MONAI Label's server says of itself."""
        return describe(list(service.served.models.values()))

    @app.post(
        "/infer/{model}",
        responses={
            200: {
                "content": {
                    kind: {"schema": {"type": "string"}} for kind in ("multipart/form-data", "application/octet-stream")
                }
            },
            **refused,
        },
        response_class=Response,
        openapi_extra=_FORM,
    )
    async def infer(
        request: Request,
        model: str,
        image: str = "",
        session_id: str = "",
        output: Literal["image", "json", "all"] = "all",
    ) -> Response:
        """Predict the `file` of a form."""
        job = await service.take_on(request, model, [USUAL], is_kept=False, fields=("file",), check=_check_params)
        await finished(service, job, request)
        done = BackgroundTask(service.store.remove, job)
        told = {
            "label_names": {label.name: label.value for label in service.served.models[model].labels},
            "latencies": job.times_s,
        }
        assert job.result is not None
        if output == "json":
            return JSONResponse(told, background=done)
        if output == "image":
            return FileResponse(job.result, media_type=job.media_type, filename=job.result.name, background=done)
        content = await run_in_threadpool(job.result.read_bytes)
        body, kind = _form(told, job.result.name, job.media_type, content)
        return Response(body, media_type=kind, background=done)


def _check_params(fields: dict[str, str]) -> None:
    """Settings of MONAI Label's own networks: there is none that means something here. Raises RefusedError."""
    try:
        is_object = isinstance(parse_json(fields.get("params") or "{}", "params"), dict)
    except CorruptError:
        is_object = False
    if not is_object:
        raise RefusedError(422, "params: expected a JSON object")


def describe(models: "list[ModelCard]") -> dict[str, Any]:
    """The answer of `/info/`."""
    return {
        "name": "FastnnUNet",
        "description": "nnU-Net students and ensembles",
        "version": __version__,
        "labels": sorted({label.name for model in models for label in model.labels}),
        "models": {
            model.id: {
                "type": "segmentation",
                "labels": {label.name: label.value for label in model.labels},
                "dimension": model.dimensions,
                "description": model.name,
                "config": {},
            }
            for model in models
        },
        "trainers": {},
        "strategies": {},
        "scoring": {},
        "train_stats": {},
        "datastore": {},
    }


def _form(told: dict[str, Any], name: str, media_type: str, content: bytes) -> tuple[bytes, str]:
    """A form of `params` and `image`, as MONAI Label's client reads it, and its media type."""
    boundary = secrets.token_hex(16)
    params = json.dumps(told)
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="params"\r\nContent-Type: application/json\r\n\r\n'
        f'{params}\r\n--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        f"Content-Type: {media_type}\r\n\r\n"
    )
    return head.encode() + content + f"\r\n--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"
