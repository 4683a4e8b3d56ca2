"""What the name of an image means, on the command line."""

from __future__ import annotations

import pytest

from qedcore.cli.locate import Location, locate
from qedcore.errors import RequestError, UnsupportedError

LOCATED = {
    ("a.qed", None, False): ("a.qed", None),
    ("a.qed", "qed", False): ("a.qed", "qed"),
    ("dir/a:b", None, False): ("dir/a:b", None),
    ("file:a.qed", "raw", False): ("a.qed", "raw"),
    ("driver=qed,file.filename=a.qed", None, True): ("a.qed", "qed"),
    ("driver=qed,file.filename=a,,b.qed", None, True): ("a,b.qed", "qed"),
    ("file.filename=a.qed", None, True): ("a.qed", None),
    ("driver=file,filename=a", None, True): ("a", "raw"),
    ('json:{"driver":"qed","file":{"filename":"a.qed"}}', None, False): ("a.qed", "qed"),
    ("json:{'driver':'qed','file':{'filename':'it\\'s \"a\".qed'}}", None, False): ('it\'s "a".qed', "qed"),
    ('json:{"driver":"null-co","size":5}', None, False): (None, "null-co"),
}


@pytest.mark.parametrize("given", LOCATED)
def test_locate(given: tuple[str, str | None, bool]) -> None:
    path, format = LOCATED[given]
    assert locate(*given) == Location(given[0], path, format)


@pytest.mark.parametrize(
    ("given", "uri"),
    [
        (("nbd://host/name", None, False), "nbd://host/name"),
        (("nbd+unix:///?socket=s", "qed", False), "nbd+unix:///?socket=s"),
        (("nbd:host:7:exportname=a b", None, False), "nbd://host:7/a%20b"),
        (("nbd:unix:s", None, False), "nbd+unix:///?socket=s"),
        (("driver=qed,file.driver=nbd,file.host=h", None, True), "nbd://h:10809/"),
        (("json:{'driver':'qed','file':{'driver':'nbd','server':{'type':'unix','path':'s'}}}", None, False),
         "nbd+unix:///?socket=s"),
        (("driver=qcow2,file.driver=nbd,file.host=h", None, True), None),
        (("driver=qed,file.driver=nbd,file.host=h,file.tls-creds=t", None, True), None),
    ],
)  # fmt: skip
def test_locate_on_a_server(given: tuple[str, str | None, bool], uri: str | None) -> None:
    found = locate(*given)
    assert (found.path, found.uri, found.place) == (None, uri, uri)
    assert locate("a.qed").place == "a.qed"


@pytest.mark.parametrize(
    ("name", "format", "image_opts", "error", "message"),
    [
        ("a.qed", "qed", True, RequestError, "mutually exclusive"),
        ("json:{", None, False, RequestError, "JSON"),
        ("driver=qed,file.filename=a,foo=1", None, True, UnsupportedError, "does not support the option 'foo'"),
    ],
)
def test_locate_refuses(
    name: str, format: str | None, image_opts: bool, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        locate(name, format, image_opts)
