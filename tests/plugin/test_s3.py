"""The worked example of the README: an image in an S3 bucket, through nbdkit's S3 plugin.  Not in the default run."""

from __future__ import annotations

import random
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.patterns import KiB, MiB, Model, write_at_random
from support.qed_image import Built
from support.server import Backend, Nbdkit, free_port, wait_for
from support.tools import PYTHON, require, run_ok

Serve = Callable[..., Nbdkit]
pytestmark = pytest.mark.s3
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
CREATE_BUCKET = "import boto3, sys; boto3.client('s3', endpoint_url=sys.argv[1]).create_bucket(Bucket='disks')"


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an S3 server with an empty bucket called disks."""
    require("moto_server")
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with open(tmp_path / "moto.log", "wb") as log:
        process = subprocess.Popen(["moto_server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    try:

        def answers() -> bool:
            assert process.poll() is None, (tmp_path / "moto.log").read_text()
            try:
                urllib.request.urlopen(url, timeout=5).close()
            except urllib.error.HTTPError:
                return True
            except OSError:
                return False
            return True

        wait_for(answers, "moto listens", 60)
        run_ok([PYTHON, "-c", CREATE_BUCKET, url])
        yield url
    finally:
        process.kill()
        process.wait()


def bucket_server(url: str) -> Nbdkit:
    """nbdkit with its S3 plugin."""
    return Backend("S3", f"endpoint-url={url}", "bucket=disks", "key=disk", "size=32M", "object-size=64K").start()


def test_image_in_a_bucket(
    tmp_path: Path, image: Callable[..., Built], serve: Serve, s3: str, rng: random.Random
) -> None:
    built = image(size=64 * MiB, layout="D-Z-D")
    model = Model(64 * MiB, built.read)
    with bucket_server(s3) as bucket:
        run_ok([PYTHON, "-c", COPY_IN, built.path, bucket.uri])
    for _ in range(2):
        with bucket_server(s3) as bucket:
            server = serve(bucket.uri)
            client = server.connect()
            write_at_random(client, model, rng, 64 * KiB, 20)
            client.shutdown()
            server.stop()
            bucket.kill()


COPY_IN = """
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[2])
data = open(sys.argv[1], "rb").read()
data += bytes(-len(data) % 65536)
for at in range(0, len(data), 65536):
    h.pwrite(data[at:at + 65536], at)
h.flush()
h.shutdown()
"""
