"""A module of 3D Slicer, a file by itself: sends the volume on show to `fastnnunet serve` and loads what it segments.

It runs in Slicer's own Python (3.9 and later), where neither FastnnUNet nor its requirements are installed, so the HTTP
below is written for it alone. Everything of Slicer stands in the widget and in `load_segmentation`.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import ctk
import qt
import slicer
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleWidget,
)

URL, TOKEN_VARIABLE = "http://127.0.0.1:8000", "FASTNNUNET_TOKEN"
LOOK_S, SILENCE_S = 0.2, 60.0
LONGEST_ANSWER = 1 << 32
OVER = ("done", "failed", "cancelled", "lost")
PIECE, LONGEST_JSON = 1 << 20, 1 << 25


class SlicerServiceError(Exception):
    """What the user is told: one sentence."""


class SlicerService:
    """The addresses of the service that this module needs."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url, self._token = url.rstrip("/"), token or None
        if not self.url.startswith(("http://", "https://")):
            raise SlicerServiceError(f"the address {url} is none, expected one such as {URL}")

    def models(self) -> list[dict[str, Any]]:
        """All models, each as the service tells it. Raises SlicerServiceError."""
        return self._json("/models")["models"]

    def predict(self, model: str, image: Path, result: Path, wait: Callable[[str], bool]) -> None:
        """Send an image and write its label map to `result`. `wait` is called with the state until the job is over; it
        may show it, and returns whether to go on. Raises SlicerServiceError.
        """
        boundary = secrets.token_hex(16)
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="image"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()
        tail = f"\r\n--{boundary}--\r\n".encode()

        def pieces() -> Iterator[bytes]:
            yield head
            with image.open("rb") as f:
                while piece := f.read(PIECE):
                    yield piece
            yield tail

        headers = {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Content-Length": str(len(head) + image.stat().st_size + len(tail)),
        }
        path = f"/models/{quote(model, safe='')}/jobs"
        job = self._json(path, method="POST", data=pieces(), headers=headers)
        place = f"/jobs/{quote(job['id'], safe='')}"
        try:
            while job["state"] not in OVER:
                if not wait(job["state"]):
                    raise SlicerServiceError("cancelled")
                time.sleep(LOOK_S)
                job = self._json(place)
            if job["state"] != "done":
                raise SlicerServiceError(job["error"] or f"the job is {job['state']}")
            with self._open(f"{place}/result") as answer, result.open("wb") as f:
                left = LONGEST_ANSWER
                while piece := answer.read(PIECE):
                    left -= len(piece)
                    if left < 0:
                        raise SlicerServiceError("the service sends more than a label map can be")
                    f.write(piece)
        finally:
            try:
                self._json(place, method="DELETE")
            except SlicerServiceError as e:  # the service forgets it by itself in time
                print(f"FastnnUNet: {e}")

    def _json(self, path: str, **more: Any) -> Any:
        with self._open(path, **more) as answer:
            try:
                return json.loads(answer.read(LONGEST_JSON))
            except ValueError:
                raise SlicerServiceError(f"{self.url} answers no JSON; is it a FastnnUNet service?") from None

    def _open(self, path: str, **more: Any) -> Any:
        request = urllib.request.Request(f"{self.url}{path}", **more)
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            # the service is near: a proxy that leads out would not find it
            return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=SILENCE_S)
        except urllib.error.HTTPError as e:
            with e:
                try:
                    sentence = json.loads(e.read(PIECE))["error"]
                except (ValueError, KeyError, TypeError, OSError):
                    sentence = "is it a FastnnUNet service?"
            raise SlicerServiceError(f"{self.url} refuses ({e.code}): {sentence}") from None
        except OSError as e:
            reason = getattr(e, "reason", e)
            raise SlicerServiceError(
                f"{self.url} cannot be reached ({reason}); start it: fastnnunet serve BUNDLE"
            ) from None


class FastnnUNet(ScriptedLoadableModule):
    """What Slicer lists."""

    def __init__(self, parent: Any) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        parent.title = "FastnnUNet"
        parent.categories = ["Segmentation"]
        parent.dependencies = []
        parent.contributors = ["The FastnnUNet developers"]
        parent.helpText = "Segments a volume by a local service: start it with <code>fastnnunet serve BUNDLE</code>."
        parent.acknowledgementText = ""


class FastnnUNetWidget(ScriptedLoadableModuleWidget):
    """Address, token, model, volume, and a button."""

    def setup(self) -> None:
        ScriptedLoadableModuleWidget.setup(self)
        box = ctk.ctkCollapsibleButton()
        box.text = "Segment"
        self.layout.addWidget(box)
        form = qt.QFormLayout(box)
        self.url = qt.QLineEdit(URL)
        self.token = qt.QLineEdit(os.environ.get(TOKEN_VARIABLE, ""))
        self.token.setEchoMode(qt.QLineEdit.Password)
        self.model = qt.QComboBox()
        self.volume = slicer.qMRMLNodeComboBox()
        self.volume.nodeTypes = ["vtkMRMLScalarVolumeNode"]
        self.volume.addEnabled = self.volume.removeEnabled = False
        self.volume.setMRMLScene(slicer.mrmlScene)
        self.connectButton = qt.QPushButton("Ask for models")
        self.applyButton = qt.QPushButton("Segment")
        self.status = qt.QLabel("")
        self.status.wordWrap = True
        for label, widget in (("Service", self.url), ("Token", self.token), ("", self.connectButton)):
            form.addRow(label, widget)
        for label, widget in (
            ("Model", self.model),
            ("Volume", self.volume),
            ("", self.applyButton),
            ("", self.status),
        ):
            form.addRow(label, widget)
        self.connectButton.connect("clicked(bool)", self.onConnect)
        self.applyButton.connect("clicked(bool)", self.onApply)
        self.models: list[dict[str, Any]] = []
        self.layout.addStretch(1)

    def onConnect(self, *_: Any) -> None:
        """Fill in the models of one channel."""
        self._guarded(self._list_models)

    def onApply(self, *_: Any) -> None:
        """Segment the volume that is chosen."""
        self._guarded(self._segment)

    def _guarded(self, work: Callable[[], str]) -> None:
        self.applyButton.enabled = False
        try:
            self.status.text = work()
        except SlicerServiceError as e:
            self.status.text = str(e)
        finally:
            self.applyButton.enabled = True

    def _service(self) -> SlicerService:
        return SlicerService(self.url.text, self.token.text)

    def _list_models(self) -> str:
        models = self._service().models()
        self.models = [model for model in models if len(model["channels"]) == 1]
        self.model.clear()
        self.model.addItems([model["id"] for model in self.models])
        return f"{len(self.models)} model(s) of one channel"

    def _segment(self) -> str:
        node, index = self.volume.currentNode(), self.model.currentIndex
        if node is None or not 0 <= index < len(self.models):
            raise SlicerServiceError("choose a volume and, after asking for models, one of them")

        def wait(state: str) -> bool:
            self.status.text = f"{state} ..."
            slicer.app.processEvents()
            return True

        FastnnUNetLogic().segment(self._service(), self.models[index], node, wait)
        return "done"


class FastnnUNetLogic(ScriptedLoadableModuleLogic):
    """From a volume to a segmentation; for scripts too."""

    def segment(
        self, service: SlicerService, model: dict[str, Any], node: Any, wait: Callable[[str], bool] = lambda _: True
    ) -> Any:
        """The segmentation node that a model makes of a volume node. Raises SlicerServiceError."""
        with tempfile.TemporaryDirectory(prefix="fastnnunet-") as folder:
            image, result = Path(folder) / "image.nii.gz", Path(folder) / "labels.nii.gz"
            if not slicer.util.saveNode(node, str(image)):
                raise SlicerServiceError("Slicer cannot write this volume as NIfTI")
            service.predict(model["id"], image, result, wait)
            return load_segmentation(result, model["labels"], node)


def colours_of(labels: list[dict[str, Any]]) -> list[tuple[int, str, float, float, float]]:
    """Value, name, and red, green, blue from 0 to 1, of every label."""
    return [
        (label["value"], label["name"], *(int(label["colour"][at : at + 2], 16) / 255 for at in (1, 3, 5)))
        for label in labels
    ]


def load_segmentation(file: Path, labels: list[dict[str, Any]], source: Any) -> Any:
    """A label map as a segmentation node, on the grid of the volume it was made of, with the names of its labels."""
    colours = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLColorTableNode")
    colours.SetTypeToUser()
    colours.SetNumberOfColors(max((label["value"] for label in labels), default=0) + 1)
    colours.SetColor(0, "background", 0, 0, 0, 0)
    for value, name, red, green, blue in colours_of(labels):
        colours.SetColor(value, name, red, green, blue, 1)
    label_map = slicer.util.loadLabelVolume(str(file))
    label_map.GetDisplayNode().SetAndObserveColorNodeID(colours.GetID())
    segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", f"{source.GetName()} segmentation")
    segmentation.CreateDefaultDisplayNodes()
    segmentation.SetReferenceImageGeometryParameterFromVolumeNode(source)
    slicer.modules.segmentations.logic().ImportLabelmapToSegmentationNode(label_map, segmentation)
    slicer.mrmlScene.RemoveNode(label_map)
    slicer.mrmlScene.RemoveNode(colours)
    return segmentation
