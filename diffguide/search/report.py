"""What a search found, as a page."""

from diffguide.search.headhunter import Result
from diffguide.search.plan import Hunt


def report(plan: Hunt, found: Result) -> str:
    """Markdown: the heads, the settings, and the best and worst trials of every round."""
    lines = [
        f"# Heads for {plan.objective}",
        "",
        f"`{found.text}`",
        "",
        f"Plain {found.plain:.4g}. Prompts: {len(plan.prompts)}, seeds {', '.join(map(str, plan.seeds))}, "
        f"{plan.steps} steps, guidance {plan.guidance_scale:g}. Layers: {plan.layers}. "
        f"SoftPAG: scale {plan.scale:g}, blend {plan.blend:g}, target {plan.target}, scope {plan.scope}.",
        "",
        "![scores of single heads](heads.png)",
    ]
    lines += [f"\n{text}" for text in found.screened]
    for number, scores in enumerate(found.rounds):
        ordered = sorted(scores.items(), key=lambda item: -item[1])
        lines += ["", f"## Round {number + 1}", "", "| head | score | to plain |", "|---|---|---|"]
        shown = ordered if len(ordered) <= 10 else [*ordered[:5], *ordered[-5:]]
        lines += [f"| L{a}H{b} | {value:.4g} | {value - found.plain:+.3g} |" for (a, b), value in shown]
    lines += ["", "Prompts:", "", *(f"- {prompt}" for prompt in plan.prompts), ""]
    return "\n".join(lines)
