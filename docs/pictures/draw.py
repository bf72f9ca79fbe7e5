"""Draws the pictures of the documents: `python docs/pictures/draw.py`. A test holds them to what the source says."""

from __future__ import annotations

from html import escape
from pathlib import Path

HERE = Path(__file__).parent
WIDTH = 960
INK, PALE, LINE, ACCENT = "#1f2933", "#52606d", "#9aa5b1", "#0b69a3"
FILLS = ("#f0f4f8", "#e6f6ff", "#e3f8ff", "#effcf6", "#fffbea", "#fff3e0", "#ffeeee", "#f5f0ff")

FLOORS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("core", "configuration, errors, logs, seeds, files, environment, C++ extensions"),),
    (
        ("model", "Transformer, attention, experts"),
        ("text", "tokenizers, templates, answers"),
        ("sandbox", "programs that a model wrote"),
        ("charts", "a folder for each report"),
    ),
    (
        ("data", "documents to batches"),
        ("judging", "how good an answer is"),
        ("checkpoint", "runs, Hugging Face folders, GGUF"),
        ("parallel", "the world of ranks"),
    ),
    (("training", "the loop, which knows no method"), ("generation", "the engine, sampling, scoring")),
    (
        ("methods", "what a way of training fills in"),
        ("analysis", "what the experts do"),
        ("compression", "models made smaller"),
        ("evaluation", "tasks, judged and counted"),
    ),
    (("runs", "recipe, observers, checkpoints, summary"), ("server", "OpenAI's API, a page, talking")),
    (("studies", "comparisons at matched compute, the papers' claims"),),
    (("cli", "verbs only"),),
)
"""From the ground up: packages of each floor, and what they hold."""


def text(
    x: float, y: float, words: str, size: int = 14, fill: str = INK, weight: str = "normal", anchor: str = "start"
):
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" font-weight="{weight}" text-anchor="{anchor}">'
        f"{escape(words)}</text>"
    )


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = LINE) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" stroke="{stroke}"/>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return (
        f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{PALE}" stroke-width="1.5" '
        'marker-end="url(#head)"/>'
    )


def page(height: float, title: str, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'font-family="Helvetica, Arial, sans-serif"><title>{escape(title)}</title>'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{PALE}"/></marker></defs>'
        f'<rect width="{WIDTH}" height="{height:g}" fill="#ffffff"/>'
    )
    return "\n".join([head, *parts, "</svg>\n"])


def floors() -> str:
    parts, band, gap = [], 62, 8
    for number, rooms in enumerate(FLOORS):
        y = 12 + (len(FLOORS) - 1 - number) * (band + gap)
        parts.append(text(24, y + band / 2 + 5, str(number), 20, LINE, "bold", "middle"))
        width = (WIDTH - 64 - gap * (len(rooms) - 1)) / len(rooms)
        for place, (name, holds) in enumerate(rooms):
            x = 52 + place * (width + gap)
            parts += [
                box(x, y, width, band, FILLS[number]),
                text(x + 14, y + 26, name, 17, INK, "bold"),
                text(x + 14, y + 47, holds, 13, PALE),
            ]
    height = 12 + len(FLOORS) * (band + gap) + 24
    rule = "A package uses its own files and every floor below it: never its neighbours, never a floor above."
    parts.append(text(52, height - 10, rule, 13, PALE))
    return page(height, "The eight floors of finemoe", parts)


def column(x: float, width: float, title: str, rows: list[tuple[str, str]], fill: str, top: float = 44) -> list[str]:
    """A column of boxes under a title, an arrow from each to the next."""
    parts, high, gap = [text(x, top - 16, title, 15, ACCENT, "bold")], 56, 18
    for place, (name, what) in enumerate(rows):
        y = top + place * (high + gap)
        parts += [
            box(x, y, width, high, fill),
            text(x + 12, y + 23, name, 14, INK, "bold"),
            text(x + 12, y + 43, what, 12, PALE),
        ]
        if place and name != "StepReport":  # that one comes back from the trainer
            parts.append(arrow(x + width / 2, y - gap + 1, x + width / 2, y - 2))
    return parts


def batch() -> str:
    run = [
        ("recipe.toml", "what differs from a preset"),
        ("RunConfig", "resolved: every default spelt out"),
        ("Method", "data, objective, what may move"),
        ("batch(position, n)", "a pure function: resume is one number"),
        ("StepReport", "to validate, log, warn, show, save"),
    ]
    step = [
        ("1 counts", "denominators, over the whole step"),
        ("2 terms, backward", "sum / count of each micro-batch"),
        ("3 before the update", "not finite: stop here; else clip"),
        ("4 update", "AdamW or Muon at the scheduled rate"),
        ("5 after the update", "selection biases move by the load"),
        ("6 report", "loss, terms, load, speed"),
    ]
    model = [
        ("embedding", "ids to states"),
        ("attention", "norm, attend, add; in every block"),
        ("router", "a RoutingDecision for each token"),
        ("dispatch", "token copies sorted by expert"),
        ("experts", "grouped products"),
        ("combine", "times the gate, plus shared experts"),
        ("norm, loss in chunks", "never tokens x vocabulary at once"),
    ]
    parts = column(16, 284, "A run", run, FILLS[5])
    parts += column(338, 284, "Trainer.step", step, FILLS[3])
    parts += column(660, 284, "The model, inside 2", model, FILLS[1])
    parts += [
        arrow(300, 44 + 3 * 74 + 28, 336, 44 + 28),
        arrow(336, 44 + 5 * 74 + 28, 302, 44 + 4 * 74 + 40),
        arrow(622, 44 + 74 + 16, 658, 44 + 16),
        arrow(658, 44 + 6 * 74 + 28, 624, 44 + 74 + 42),
    ]
    return page(44 + 7 * 74 + 4, "The way of a batch through a run, a step and the model", parts)


def panel(x: float, title: str, experts: int, chosen: set[int], shared: int, below: tuple[str, str]) -> list[str]:
    """One way to build a feed-forward layer: experts side by side, those that work for this token filled."""
    width, top, high, gap = 288, 178, 84, 4 if experts > 4 else 10  # areas are to scale
    each = (width - gap * (max(experts, 4) - 1)) / max(experts, 4)
    middle = x + width / 2
    parts = [text(middle, 28, title, 16, ACCENT, "bold", "middle")]
    parts += [box(middle - 62, 48, 124, 34, "#ffffff"), text(middle, 70, "a token", 14, INK, "normal", "middle")]
    if experts > 1:
        parts += [box(middle - 62, 108, 124, 34, FILLS[4]), text(middle, 130, "router", 14, INK, "normal", "middle")]
        parts.append(arrow(middle, 82, middle, 106))
    for number in range(experts):
        left = x + number * (each + gap) if experts > 1 else middle - each / 2
        works = number in chosen or number < shared
        fill = "#9fd8c0" if number < shared else "#7cc4ec" if works else "#f0f4f8"
        parts.append(box(left, top, each, high, fill))
        if works:
            origin = (middle, 142) if experts > 1 and number >= shared else (middle - (62 if experts > 1 else 0), 82)
            parts.append(arrow(*origin, left + each / 2, top - 3))
            parts.append(arrow(left + each / 2, top + high, middle, top + high + 38))
    parts += [box(middle - 62, 302, 124, 34, "#ffffff"), text(middle, 324, "next layer", 14, INK, "normal", "middle")]
    parts += [text(middle, 366 + 20 * row, words, 13, PALE, "normal", "middle") for row, words in enumerate(below)]
    return parts


def mixture() -> str:
    parts = panel(16, "Dense", 1, {0}, 0, ("One feed-forward layer.", "Every token uses all of it."))
    coarse = ("Four experts, as large as that layer each.", "The router sends a token to one of them.")
    parts += panel(336, "A mixture of experts", 4, {2}, 0, coarse)
    fine = ("Sixteen experts, a quarter as large each.", "One is always on (green); the router adds three.")
    parts += panel(656, "DeepSeekMoE: fine-grained, shared", 16, {4, 9, 14}, 1, fine)
    return page(404, "Three ways to build the feed-forward layer of a language model", parts)


PICTURES = {"floors.svg": floors, "batch.svg": batch, "mixture.svg": mixture}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (HERE / name).write_text(draw(), encoding="utf-8")
