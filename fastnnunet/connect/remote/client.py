"""The addresses of the service, as a client needs them. Its refusals, one sentence each, are told as it says them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastnnunet.connect.http import HttpAnswer, WebServer, authorization_from
from fastnnunet.connect.multipart import SentPart, multipart_body
from fastnnunet.errors import CorruptError, NotFoundError, ServerError, printable
from fastnnunet.events import Event, Listener, Message, Progress
from fastnnunet.specs.checks.json_text import parse_json
from fastnnunet.specs.checks.problems import is_number

TOKEN = "FASTNNUNET_TOKEN"
_LONGEST_SENTENCE = 1000
_ENDED = {"failed": "the job failed", "cancelled": "the job was cancelled", "lost": "the job was lost"}
_IMAGE = "application/octet-stream"
_NAMED = re.compile(r'filename="?[A-Za-z0-9_-]+((?:\.[A-Za-z0-9]{1,10}){1,3})"?')


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteModel:
    """A model as the service tells it."""

    id: str
    name: str
    channels: tuple[str, ...]
    accepts: tuple[str, ...]  # file endings
    answers: tuple[str, ...]  # formats of results
    labels: tuple[str, ...]
    measured: str  # Dice and seconds of a case in words; empty where the bundle knows none


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteService:
    """A service at an address."""

    server: WebServer

    def models(self) -> list[RemoteModel]:
        """All it has. Raises ServerError where there is no such service, or it wants another token."""
        found = self._ask("/models", lambda answer: answer.json())
        listed = found.get("models") if isinstance(found, dict) else None
        if not isinstance(listed, list):
            raise ServerError(f"{self.server.url} is no FastnnUNet service: it tells no models; is the address right?")
        try:
            return [_model(one) for one in listed]
        except (KeyError, TypeError, AttributeError) as e:
            raise ServerError(f"{self.server.url} tells its models in another way; is it of another version?") from e

    def model(self, name: str) -> RemoteModel:
        """One of them. Raises NotFoundError with those there are, and as `models`."""
        models = self.models()
        for model in models:
            if model.id == name:
                return model
        there = ", ".join(model.id for model in models) or "none"
        raise NotFoundError(f"{self.server.url} has no model {printable(name)!r}; it has {there}")

    def submit(self, model: str, images: Sequence[Path], answers: Sequence[str], series: str | None) -> str:
        """Send an image, a file for each channel. Returns the id of its job."""
        named = 'form-data; name="image"; filename="image"'
        parts = [
            SentPart(headers=(("Content-Disposition", named), ("Content-Type", _IMAGE)), content=i) for i in images
        ]
        query = [("answer", answer) for answer in answers] + ([("series", series)] if series else [])
        found = self._ask(
            f"/models/{quote(model, safe='')}/jobs",
            lambda answer: answer.json(),
            method="POST",
            body=multipart_body("multipart/form-data", parts),
            query=query,
        )
        name = found.get("id") if isinstance(found, dict) else None
        if not isinstance(name, str) or not name.isalnum():
            raise ServerError(f"{self.server.url} took the image and names no job; is it of another version?")
        return name

    def follow(self, job: str, progress: Listener) -> None:
        """Hear what a job says until it is over. Raises ServerError where it was not done."""
        last: list[dict[str, Any]] = []

        def read(answer: HttpAnswer) -> None:
            for event in _events(answer):
                if event.get("kind") == "state":
                    last[:] = [event]
                elif (told := _told(event)) is not None:
                    progress(told)

        self._ask(f"/jobs/{job}/events", read, headers={"Accept": "text/event-stream"})
        if not last or last[0].get("state") != "done":
            state = printable(last[0].get("state", "unknown")) if last else "unknown"
            what = _ENDED.get(state, f"the state of the job is {state}")
            reason = printable(last[0].get("error") or "it does not say why")[:_LONGEST_SENTENCE] if last else ""
            raise ServerError(f"{self.server.url}: {what}: {reason or 'its events ended early'}")

    def fetch(self, job: str, file: Path, most_bytes: int) -> str:
        """Write the result of a job to a file. Returns the ending that it should have."""

        def read(answer: HttpAnswer) -> str:
            with file.open("wb") as f:
                for piece in answer.pieces():
                    f.write(piece)
            named = _NAMED.search(answer.header("Content-Disposition") or "")
            return named[1] if named else ""

        return self._ask(f"/jobs/{job}/result", read, most_bytes=most_bytes)

    def forget(self, job: str) -> None:
        """Cancel a job, or remove its result."""
        self._ask(f"/jobs/{job}", lambda answer: answer.content(), method="DELETE", is_repeatable=False)

    def _ask(self, path: str, read: Any, **more: Any) -> Any:
        return self.server.ask(path, read, refused=self._refused, **more)

    def _refused(self, status: int, said: bytes) -> str | None:
        """The service's own sentence."""
        try:
            found = parse_json(said, "the answer")
        except CorruptError:
            return None
        sentence = found.get("error") if isinstance(found, dict) else None
        if not isinstance(sentence, str):
            return None
        how = f"\n{self.server.credentials}" if status == 401 else ""
        return f"{self.server.url} refuses ({status}): {printable(sentence)[:_LONGEST_SENTENCE]}{how}"


def service_at(url: str, *, timeout_s: float = 60.0, tries: int = 4, ca_file: Path | None = None) -> RemoteService:
    """The service, spoken to with the token of the environment. Raises SpecError."""
    authorization, how = authorization_from(TOKEN)
    return RemoteService(
        server=WebServer(
            url=url, authorization=authorization, credentials=how, timeout_s=timeout_s, tries=tries, ca_file=ca_file
        )
    )


def _model(told: dict[str, Any]) -> RemoteModel:
    return RemoteModel(
        id=str(told["id"]),
        name=printable(told["name"]),
        channels=tuple(printable(channel["name"]) for channel in told["channels"]),
        accepts=tuple(map(str, told["accepts"])),
        answers=tuple(map(str, told["answers"])),
        labels=tuple(printable(label["name"]) for label in told["labels"]),
        measured=_measured(told.get("measured")),
    )


def _measured(told: Any) -> str:
    quality, speed = (part if isinstance(part, dict) else {} for part in map((told or {}).get, ("quality", "speed")))
    parts = []
    if is_number(dice := quality.get("dice")) and is_number(cases := quality.get("cases")):
        of_teacher = " to its teacher" if quality.get("against") == "teacher" else ""
        kind = "held-out" if quality.get("held_out") is True else "training"
        parts.append(f"Dice {dice:.3f}{of_teacher} on {cases:g} {kind} case(s)")
    if is_number(seconds := speed.get("seconds_per_case")):
        where = "from file to file" if speed.get("begins_with") == "file" else "without files"
        parts.append(f"{seconds:.2g} s a case {where}")
    return ", ".join(parts)


def _events(answer: HttpAnswer) -> Iterator[dict[str, Any]]:
    """The data of server-sent events, each a JSON object."""
    size = 0
    for line in answer.lines():
        size += len(line)
        if size > answer.most_bytes:
            raise ServerError(f"{answer.what} sends more than {answer.most_bytes} bytes of events")
        field, _, value = line.partition(":")
        if field == "data":
            try:
                event = parse_json(value.strip(), "an event")
            except CorruptError as e:
                raise ServerError(f"{answer.what} sends events that are no JSON; is it of another version?") from e
            if isinstance(event, dict):
                yield event


def _told(event: dict[str, Any]) -> Event | None:
    """An event of the service as one of ours; None for kinds that this version does not know."""
    if event.get("kind") == "message":
        return Message(text=str(event.get("text", "")))
    done, total = event.get("done"), event.get("total")
    if event.get("kind") != "progress" or not isinstance(done, int | float):
        return None
    return Progress(
        what=str(event.get("what", "predicting")),
        done=done,
        total=total if isinstance(total, int | float) else None,
        unit=str(event.get("unit", "tiles")),
    )
