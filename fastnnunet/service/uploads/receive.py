"""What a client sends: counted while it comes, put down under names of our own, refused unopened if no image."""

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request

from fastnnunet.service.jobs import Job, JobStore
from fastnnunet.service.refusals import RefusedError
from fastnnunet.service.spec import ServiceSpec
from fastnnunet.service.uploads.archives import check_zip
from fastnnunet.service.uploads.kinds import ENDINGS, check_kind

_FORM, _MOST_FIELDS, _LONGEST_FIELD = "multipart/form-data", 32, 1 << 16
_FILE = "image"
_MOST_DIGITS = 18


def announced_bytes(request: Request, spec: ServiceSpec) -> int:
    """How long the body may become: as the client says, or the limit. Raises RefusedError where it is too long."""
    length = request.headers.get("content-length", "")
    if not length.isascii() or not length.isdigit():
        return spec.upload_bytes
    if len(length) > _MOST_DIGITS or int(length) > spec.upload_bytes:
        raise RefusedError(413, f"the upload has more bytes than {spec.upload_bytes}, the limit")
    return int(length)


async def receive(
    request: Request,
    job: Job,
    store: JobStore,
    spec: ServiceSpec,
    *,
    kinds: tuple[str, ...],
    fields: Sequence[str] = (_FILE,),
    most_files: int,
) -> dict[str, str]:
    """Put the images of a request into the folder of its job, one for each channel, in order.

    They are the files of a form, called as one of `fields` says, or the whole body. Returns the other fields.
    Raises RefusedError for what is too large or too slow, no form, or no image of one of the `kinds`.
    """
    folder = job.folder / "input"
    try:
        async with asyncio.timeout(spec.time_limit_s):
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() == _FORM:
                files, others = await _of_form(request, folder, fields, most_files)
            else:
                files, others = [await _of_body(request, folder)], {}
    except TimeoutError as e:
        raise RefusedError(408, f"the upload took more than {spec.time_limit_s:.0f} s") from e
    except MultiPartException as e:
        raise RefusedError(400, "the form is damaged, or has too many parts; expected files called image") from e
    except ClientDisconnect as e:
        raise RefusedError(400, "the upload was cut off") from e
    except OSError as e:
        raise RefusedError(507, "the service has no room left on its disk") from e
    job.inputs = tuple([await run_in_threadpool(_checked, file, job, store, spec, kinds) for file in files])
    return others


async def _of_form(
    request: Request, folder: Path, fields: Sequence[str], most_files: int
) -> tuple[list[Path], dict[str, str]]:
    files: list[Path] = []
    others: dict[str, str] = {}
    try:
        form = await request.form(max_files=most_files + 1, max_fields=_MOST_FIELDS, max_part_size=_LONGEST_FIELD)
    except (AssertionError, UnicodeError, KeyError, ValueError) as e:  # of headers that are none
        raise RefusedError(400, "the form is damaged; expected files called image") from e
    try:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                others[name] = value
            elif name in fields:
                files.append(folder / str(len(files)))
                await run_in_threadpool(_copy, value.file, files[-1])
            else:
                raise RefusedError(400, f"the form has a file of another name, expected {' or '.join(fields)}")
    finally:
        await form.close()
    if not files:
        raise RefusedError(400, f"the form has no file called {' or '.join(fields)}")
    return files, others


def _copy(source: Any, file: Path) -> None:
    with file.open("wb") as f:
        shutil.copyfileobj(source, f, 1 << 20)


async def _of_body(request: Request, folder: Path) -> Path:
    file = folder / "0"
    with file.open("wb") as f:
        async for piece in request.stream():
            f.write(piece)
    if not file.stat().st_size:
        raise RefusedError(400, "the upload is empty, expected an image, or a form with files called image")
    return file


def _checked(file: Path, job: Job, store: JobStore, spec: ServiceSpec, kinds: tuple[str, ...]) -> tuple[Path, str]:
    """The file under a name with the ending of its kind."""
    kind = check_kind(file, kinds)
    if kind == "zip":
        store.grow(job, check_zip(file, most_files=spec.files, most_bytes=spec.unpacked_bytes))
    named = file.with_name(f"{file.name}{ENDINGS[kind]}")
    file.rename(named)
    return named, kind
