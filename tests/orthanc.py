"""An Orthanc with its DICOMweb plugin, started on a free port with files of its own; skips where there is none."""

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

PLUGIN = "libOrthancDicomWeb.so"
PLACES = ("/usr/share/orthanc/plugins", "/usr/lib/orthanc/plugins", "/usr/local/share/orthanc/plugins")
USER, PASSWORD = "ada", "open:sesame-0123"


@contextlib.contextmanager
def orthanc(folder: Path) -> Iterator[str]:
    """The address of the server, without a path. It wants USER and PASSWORD."""
    program = shutil.which("Orthanc")
    plugin = next((place for folder_ in PLACES if (place := Path(folder_) / PLUGIN).exists()), None)
    if program is None or plugin is None:
        pytest.skip("Orthanc or its DICOMweb plugin is not installed: apt-get install orthanc orthanc-dicomweb")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    configuration = {
        "Name": "test",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "HttpServerEnabled": True,
        "HttpPort": port,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: PASSWORD},
        "Plugins": [str(plugin)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "EnableWado": False},
        "OverwriteInstances": False,
    }
    (folder / "storage").mkdir()
    (folder / "orthanc.json").write_text(json.dumps(configuration))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 60
            while not answers(f"{url}/system"):
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def answers(url: str) -> bool:
    try:
        asked(url)
    except (urllib.error.URLError, ConnectionError):
        return False
    return True


def asked(url: str, data: bytes | None = None) -> bytes:
    """What Orthanc's own interface, which is not DICOMweb, answers."""
    passwords = urllib.request.HTTPPasswordMgrWithPriorAuth()
    passwords.add_password(None, url, USER, PASSWORD, is_authenticated=True)
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPBasicAuthHandler(passwords)
    )
    with opener.open(urllib.request.Request(url, data=data), timeout=30) as answer:
        return answer.read()
