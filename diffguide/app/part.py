"""A part of the page that is drawn by a script of our own."""

import functools
from abc import ABCMeta
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.component_meta import updateable

FOLDER = Path(__file__).parent / "static"


class _Plain(type(gr.HTML)):
    """Gradio's metaclass without its habit of writing a .pyi beside each file that has a component."""

    def __new__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> type:
        if "__init__" in attributes:
            attributes["__init__"] = updateable(attributes["__init__"])
        return ABCMeta.__new__(cls, name, bases, attributes)


class Part(gr.HTML, metaclass=_Plain):
    """NAME.html, NAME.css and NAME.js of the folder `static`, on a value that is a JSON object.

    The template is fixed: gradio would run `{{value}}` in it as a script. What users wrote goes through `textContent`
    and `setAttribute` in the script, and nowhere else.
    """

    name = ""
    empty: dict[str, Any] = {}

    def __init__(self, value: dict[str, Any] | None = None, **options: Any) -> None:
        options.setdefault("elem_id", self.name)
        super().__init__(
            value=self.empty if value is None else value,  # type: ignore[arg-type]
            html_template=_read(f"{self.name}.html"),
            css_template=_read(f"{self.name}.css"),
            js_on_load=_read("shared.js") + _read(f"{self.name}.js"),
            apply_default_css=False,
            **options,
        )

    def preprocess(self, payload: Any) -> Any:
        """What the script sent, checked by `check`; a wrong value is told on the page."""
        return self.check(payload)

    def postprocess(self, value: Any) -> Any:
        return self.empty if value is None else value

    @classmethod
    def check(cls, payload: Any) -> Any:
        """The payload of a part that only shows is its own value."""
        return payload if isinstance(payload, dict) else cls.empty

    def api_info(self) -> dict[str, Any]:
        return {"type": "object"}

    def example_payload(self) -> Any:
        return self.empty

    def example_value(self) -> Any:
        return self.empty


@functools.cache
def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
