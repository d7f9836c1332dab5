"""The interactive demo: ``mmefficient demo``, or ``python demo/app.py``."""

from __future__ import annotations

import dataclasses
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from mmefficient.demo.ask import ask_tab
from mmefficient.demo.compare import compare_tab, evaluate_tab, heads_tab
from mmefficient.demo.plans import plan_tab
from mmefficient.demo.service import Service
from mmefficient.demo.uploads import MAX_BYTES
from mmefficient.demo.views import CSS
from mmefficient.errors import InputError
from mmefficient.models.reference.scenes import splits
from mmefficient.vlm import VLM

SAMPLES = ("existence-random", "count", "position", "reading", "caption")
WAITING = 64  # questions in the queue before more are refused
CACHE = 3600  # seconds an uploaded file is kept
SESSIONS = 64  # visitors whose last question is kept for drawing: at most 6 MB each; the others ask again


@dataclasses.dataclass
class Demo:
    """A running server: its page, its address, and the folder of its sample pictures."""

    page: gr.Blocks
    address: str
    folder: tempfile.TemporaryDirectory[str]

    def wait(self) -> None:
        """Return when the server is interrupted."""
        self.page.block_thread()

    def close(self) -> None:
        self.page.close()
        self.folder.cleanup()


def build(service: Service, folder: Path) -> gr.Blocks:
    """The page; sample pictures and policy files are written to `folder`."""
    with gr.Blocks(title="mmefficient", analytics_enabled=False, delete_cache=(CACHE, CACHE)) as page:
        gr.Markdown("# mmefficient\nWhat a plan keeps of a picture, what it answers, and what it saves.")
        with gr.Tab("Ask"):
            inputs = ask_tab(service, _samples(folder))
        with gr.Tab("Plan"):
            plan_tab(service, inputs, folder)
        with gr.Tab("Compare"):
            compare_tab(service, inputs)
            heads_tab(service, inputs)  # a tab of its own would not fit a phone's width
        with gr.Tab("Evaluate"):
            evaluate_tab(service, inputs)
    page.queue(max_size=WAITING, default_concurrency_limit=4)
    return page


def _samples(folder: Path) -> list[list[str]]:
    """Path of a picture, and question, of a validation question of some kinds."""
    found = []
    for index, kind in enumerate(SAMPLES):
        question = splits.load("val", [kind], 8 * (index + 1))[-1]  # a picture of its own each
        path = folder / f"{kind}.png"
        question.image().save(path)
        found.append([str(path), question.text])
    return found


def serve(
    models: Sequence[str] = ("reference",),
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    auth: tuple[str, str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Demo:
    """Load `models` and start the server, which runs in threads of its own until `Demo.close`.

    Nothing beyond the machine is reached or served unless `host` or `share` say so: no fonts, no analytics. Only the
    given models can be asked; uploads are bounded in bytes and pixels and read by their content.

    Args:
        port: None takes the first free one from 7860 on.
        share: also open a public link through Gradio's servers.
        auth: user and password that the page asks for.

    Raises:
        InputError: this machine cannot listen on that address or port.
    """
    _check_free(host, port)
    service = Service({name: VLM.from_pretrained(name, device=device, dtype=dtype) for name in models})
    folder = tempfile.TemporaryDirectory(prefix="mmefficient-demo-")
    page = build(service, Path(folder.name))
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        auth=auth,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        footer_links=["api"],
        run_history=False,
        max_file_size=MAX_BYTES,
        state_session_capacity=SESSIONS,
        show_error=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        pwa=False,
        quiet=True,
    )
    return Demo(page, address, folder)


def _check_free(host: str, port: int | None) -> None:
    """Gradio would try a hundred ports of an address that is not here."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        with socket.create_server((address[0], port or 0), family=family):
            pass
    except (OSError, OverflowError) as error:
        place = host if port is None else f"{host}, port {port}"
        raise InputError(f"The demo cannot listen on {place} ({error}); choose another --host or --port.") from error


if __name__ == "__main__":
    from mmefficient.cli import app

    app(["demo", *sys.argv[1:]])
