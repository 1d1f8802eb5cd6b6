"""Search for the heads that matter: any objective, any model, resumable."""

from diffguide.search.fleet import Fleet
from diffguide.search.headhunter import Result, hunt
from diffguide.search.objectives import Objective, named, objectives
from diffguide.search.plan import Hunt

__all__ = ["Fleet", "Hunt", "Objective", "Result", "hunt", "named", "objectives"]
