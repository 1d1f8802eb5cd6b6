"""The page, served."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr

from diffguide.app import page, safety
from diffguide.app.run import Runner
from diffguide.errors import ParamError

THEME = gr.themes.Base(
    primary_hue="orange", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(
    body_text_color_subdued="*neutral_700",
    body_text_color_subdued_dark="*neutral_200",
    block_info_text_color="*neutral_700",
    block_info_text_color_dark="*neutral_200",
    button_primary_background_fill="#b45309",
    button_primary_background_fill_hover="#92400e",
    button_primary_background_fill_dark="#b45309",
    button_primary_background_fill_hover_dark="#92400e",
    button_primary_text_color="white",
)


def serve(
    models: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    auth: Sequence[str] = (),
    anyone: bool = False,
    output: str | Path = "outputs",
    heads: str | Path | None = None,
    device: str | None = None,
    dtype: str = "float32",
    browser: bool = False,
    mcp: bool = False,
    wait: bool = True,
) -> tuple[gr.Blocks, str]:
    """Start the editor; returns the page and its address, with `wait` only when it was interrupted.

    Args:
        models: embedded models, folders or hub ids, the first the default.
        host, port: the address; port None is the first free one from 7860.
        auth: `NAME:PASSWORD` each; asked for when given, and needed where `host` is not this machine alone.
        anyone: let other machines in without a password.
        output: folder of the pictures.
        heads: folder of a search of heads, whose heat map is shown.
        device, dtype: see `pipelines.load`.
        browser: open the page in the browser.
        mcp: also serve the functions as tools; needs the extra `mcp`.

    Raises:
        DiffguideError: an option is wrong, or the port is taken.
    """
    pairs, folder = safety.admit(host, port, auth, anyone, output)
    if mcp:
        _check_mcp()
    runner = Runner(models, device, dtype)
    demo = page.build(runner, folder, Path(heads) if heads else None)
    demo.queue(max_size=safety.WAITING)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks itself whether it is up
    options: dict[str, Any] = {"mcp_server": True} if mcp else {}
    try:
        _, url, _ = demo.launch(
            server_name=host,
            server_port=port,
            auth=pairs or None,
            share=False,
            inbrowser=browser,
            quiet=True,
            prevent_thread_lock=True,
            allowed_paths=[str(folder)],
            max_file_size=safety.UPLOAD,
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            footer_links=["api"],
            theme=THEME,
            css=page.CSS,
            state_session_capacity=200,
            **options,
        )
    except OSError as fault:
        raise ParamError(
            f"--port {port}: cannot be served there ({fault}); name another, or none for a free one"
        ) from None
    if wait:
        print(url, flush=True)
        demo.block_thread()
    return demo, url


def _check_mcp() -> None:
    import importlib.util

    if importlib.util.find_spec("mcp") is None:
        raise ParamError("--mcp needs the extra mcp: pip install 'diffguide[mcp]'")
