"""Object stores for the tests: fsspec's memory:// and an S3 server (moto) on this machine."""

import os
import secrets
from contextlib import contextmanager
from urllib.request import Request, urlopen

import pytest


@contextmanager
def s3_server():
    """An S3 server for this process and those it starts; yields (patch, client) once the environment points at it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setenv("AWS_CONFIG_FILE", "/dev/null")
            patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
            forget_clients()
            yield boto3.client("s3")
    finally:
        forget_clients()
        server.stop()


@contextmanager
def access_refused():
    """The server accepts no key."""
    allow = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"  # how many more requests are let in
    headers = {"Content-Type": "text/plain"}
    urlopen(Request(allow, b"0", headers)).close()
    try:
        yield
    finally:
        urlopen(Request(allow, b"inf", headers)).close()


def forget_clients():
    """The next access reads the environment again."""
    import s3fs

    from fastnnunet.cache.store.storage import _file_system

    _file_system.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


def new_bucket(client):
    name = f"bucket-{secrets.token_hex(4)}"
    client.create_bucket(Bucket=name)
    return name
