"""Search for the heads that matter: any objective, any model, resumable."""

from diffguide.search.headhunter import Hunt, Result, hunt
from diffguide.search.objectives import Objective, named, objectives

__all__ = ["Hunt", "Objective", "Result", "hunt", "named", "objectives"]
