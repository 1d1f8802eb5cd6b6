"""Layout to picture in one call."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from diffguide.describe import make, wants_layout
from diffguide.errors import LayoutError
from diffguide.guide import Guide
from diffguide.layout import Layout
from diffguide.method import Method
from diffguide.pipelines.source import load
from diffguide.processors import named
from diffguide.report import Report


class LayoutPipeline:
    """A text-to-image pipeline that also takes a layout.

    `LayoutPipeline.from_pretrained(model)(prompt, layout=layout)` returns what the pipeline itself returns. The
    pipeline is in `pipe`, untouched between calls, and what the last call cost in `report`.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.report = Report()

    @classmethod
    def from_pretrained(cls, model: str | Path, *, dtype: str = "float32", device: str | None = None) -> Self:
        """Load an embedded model, a folder or a hub id; see `load`."""
        return cls(load(model, dtype, device))

    def __call__(
        self,
        prompt: str | list[str],
        *,
        layout: Layout,
        method: str = "bacon",
        params: Mapping[str, Any] | None = None,
        also: Sequence[Method] = (),
        **options: Any,
    ) -> Any:
        """Draw the prompt with its phrases where the layout says.

        Args:
            prompt: one or several; the layout holds for each of them.
            layout: where the phrases go.
            method: name of a method that takes a layout.
            params: its parameters, where they are not the defaults.
            also: more methods, which act after it.
            options: of the pipeline's call, such as `num_inference_steps` and `generator`.

        Raises:
            DiffguideError: an unknown method or parameter, a phrase not in the prompt, a pipeline that is not known.
        """
        if not wants_layout(named(method)):
            raise LayoutError(
                f"{method} does not act on a layout; pass it in also=[...] and name a layout method such as bacon"
            )
        with Guide(self.pipe, make(method, params, layout), *also) as guide:
            output = self.pipe(prompt, **options)
        self.report = guide.report
        return output
