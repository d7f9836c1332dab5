"""The server behind the page: named endpoints, many users, and requests that no browser would send."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

import mmefficient as mm
from mmefficient.cli import app
from mmefficient.demo.uploads import MAX_BYTES
from mmefficient.errors import InputError
from mmefficient.models import reference

if TYPE_CHECKING:
    from mmefficient.demo.app import Demo

gradio_client = pytest.importorskip("gradio_client", reason="the demo needs the extra 'demo'")
QUESTION = "Is there a frog in the image?"


@pytest.fixture
def client(demo: Demo) -> Any:
    return gradio_client.Client(demo.address, verbose=False)


def picture() -> Any:
    return gradio_client.handle_file(str(reference.sample_picture()))


def call(demo: Demo, name: str, data: list[Any]) -> str:
    """What the server streams back for a hand-written request."""
    body = json.dumps({"data": data}).encode()
    url = f"{demo.address}gradio_api/call/{name}"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{url}/{event}", timeout=120) as stream:
        return stream.read().decode()


def test_every_action_has_a_named_endpoint(client: Any) -> None:
    named = set(client.view_api(return_format="dict", print_info=False)["named_endpoints"])
    assert named == {"/ask", "/kept", "/check_plan", "/load_policy", "/compare", "/heads", "/evaluate"}


@pytest.mark.parametrize("place", [{"host": "192.0.2.1"}, {"host": "no such host"}, {"port": 70000}])
def test_where_this_machine_cannot_listen(place: dict[str, Any]) -> None:
    from mmefficient.demo.app import serve

    with pytest.raises(InputError, match="cannot listen on"):
        serve(("never loaded",), **place)


def test_the_client_gets_what_the_wrapper_answers(client: Any) -> None:
    plan = "fastv(layer=2,keep=0.25)"
    left, right, *costs = client.predict("reference", picture(), QUESTION, "none", plan, api_name="/ask")
    vlm = mm.VLM.from_pretrained("reference", device="cpu")
    assert left == vlm.ask(reference.sample_picture(), QUESTION).text
    assert right == vlm.ask(reference.sample_picture(), QUESTION, plan=plan).text
    assert "576 in layers 0-1, 144 in layers 2-11" in costs[1]
    drawn, words = client.predict("kept, right plan", 5, api_name="/kept")  # the same session
    assert Path(drawn).stat().st_size > 1000
    assert "144 of 576" in words


def test_eight_users_wait_in_line_and_none_is_lost(demo: Demo) -> None:
    clients = [gradio_client.Client(demo.address, verbose=False) for _ in range(8)]
    jobs = [each.submit("reference", picture(), QUESTION, "none", "exit(layer=6)", api_name="/ask") for each in clients]
    ranks: set[int] = set()
    while not all(job.done() for job in jobs):
        ranks |= {job.status().rank for job in jobs if job.status().rank is not None}
        time.sleep(0.05)  # the server is in this process, and wants to run
    assert len({job.result()[0] for job in jobs}) == 1
    assert len(ranks) > 2, "users must see how many are before them"


def test_mistakes_come_back_as_sentences(client: Any) -> None:
    def told(*arguments: Any) -> str:
        with pytest.raises(gradio_client.exceptions.AppError) as caught:
            client.predict(*arguments, api_name="/ask")
        message = str(caught.value)
        assert "Traceback" not in message
        assert str(Path.home()) not in message
        assert "site-packages" not in message
        return message

    assert "did you mean 'fastv'" in told("reference", picture(), QUESTION, "none", "fastvv(layer=1)")
    assert "Give a picture" in told("reference", None, QUESTION, "none", "none")
    assert "Write a question" in told("reference", picture(), "", "none", "none")
    assert "layers 0 to 11" in told("reference", picture(), QUESTION, "none", "exit(layer=50)")
    assert "does not serve" in told("reference", picture(), QUESTION, "none", "dyvte(gates='/etc/passwd')")


@pytest.mark.parametrize("path", ["/etc/passwd", str(reference.path() / "config.json"), "../../../etc/passwd"])
def test_no_path_in_a_request_reads_another_file(demo: Demo, path: str) -> None:
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    streamed = call(demo, "ask", ["reference", file, QUESTION, "none", "none"])
    assert "event: error" in streamed
    streamed += call(demo, "load_policy", [file])
    assert streamed.count("event: error") == 2
    assert "root:" not in streamed
    assert "architectures" not in streamed
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{demo.address}gradio_api/file={path}", timeout=30)
    assert refused.value.code in (403, 404)


def test_addresses_are_not_fetched(demo: Demo) -> None:
    for url in (f"{demo.address}config", "file:///etc/passwd", "http://169.254.169.254/latest/meta-data"):
        file = {"path": url, "url": url, "meta": {"_type": "gradio.FileData"}}
        assert "event: error" in call(demo, "ask", ["reference", file, QUESTION, "none", "none"])


def test_only_models_given_at_start_are_served(demo: Demo) -> None:
    file = {"path": "x", "meta": {"_type": "gradio.FileData"}}
    assert "event: error" in call(demo, "ask", ["/etc", file, QUESTION, "none", "none"])
    assert "event: error" in call(demo, "evaluate", ["llava-hf/llava-1.5-7b-hf", "none", 11])


def test_large_uploads_are_refused(demo: Demo) -> None:
    boundary = "x" * 16
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head.encode() + b"0" * (MAX_BYTES + 2**20) + f"\r\n--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    request = urllib.request.Request(f"{demo.address}gradio_api/upload", body, kind)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 413


def test_it_listens_on_this_machine_alone(demo: Demo) -> None:
    assert demo.address.startswith("http://127.0.0.1:")
    assert demo.page.share_url is None


def test_the_file_itself_is_the_command() -> None:
    page = Path(__file__).parents[2] / "demo" / "app.py"
    done = subprocess.run([sys.executable, page, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "--share" in done.stdout


def test_a_bad_password_option_is_one_sentence() -> None:
    done = CliRunner().invoke(app, ["demo", "--auth", "nopassword"])
    assert done.exit_code != 0
    assert "USER:PASSWORD" in str(done.exception)
