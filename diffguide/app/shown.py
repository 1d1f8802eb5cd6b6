"""Parts of the page that only show."""

from diffguide.app.part import Part


class ProgressView(Part):
    """How far a job is: kind ("", "running", "done", "error"), text, step, steps, preview (a data URL)."""

    name = "progress"
    empty = {"kind": "", "text": "Ready."}


class Notes(Part):
    """What is to be known before running: notes with level and text."""

    name = "notes"
    empty = {"notes": []}


class Curves(Part):
    """Losses: series of points, the pass at which each step begins, and the cost."""

    name = "curves"
    empty = {"series": [], "steps": [], "cost": ""}


class MapView(Part):
    """Maps of words over a picture; see `results.maps_of`."""

    name = "maps"
    empty = {"words": []}
