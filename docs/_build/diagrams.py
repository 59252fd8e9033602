"""The drawings of docs/how-it-works.md: `python docs/_build/diagrams.py` writes docs/pictures/*.svg."""

from __future__ import annotations

from pathlib import Path

PICTURES = Path(__file__).parents[1] / "pictures"
INK, BLUE, ORANGE, PALE = "#263238", "#3f51b5", "#e65100", "#e8eaf6"


def svg(width: int, height: int, parts: list[str]) -> str:
    """A drawing on a light card, which is read on dark pages as well."""
    body = "\n".join(parts)
    arrow = (
        '<marker id="{0}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="{1}"/></marker>'
    )
    heads = arrow.format("blue", BLUE) + arrow.format("orange", ORANGE)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="14">\n<defs>{heads}</defs>\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="#fafafa"/>\n{body}\n</svg>\n'
    )


def text(x: float, y: float, words: str, colour: str = INK, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}">{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = INK) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" stroke="{stroke}"/>'


def line(x0: float, y0: float, x1: float, y1: float, head: str, dash: str = "") -> str:
    colour = BLUE if head == "blue" else ORANGE
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<path d="M{x0:g} {y0:g} L{x1:g} {y1:g}" stroke="{colour}" stroke-width="2" fill="none"'
        f' marker-end="url(#{head})"{dashed}/>'
    )


def tableau(steps: int = 4, cell: int = 34) -> str:
    """Two triangles; row n makes x[n+1]."""
    parts = []
    for offset, name, inputs in ((110, "A", "x"), (330, "B", "F")):
        parts.append(text(offset + steps * cell / 2, 24, f"{name}: weights of {inputs}[j]"))
        for n in range(steps):
            for j in range(steps):
                used = j <= n
                fill = "none" if not used else ORANGE if n == 2 else PALE
                stroke = INK if used else "#cfd8dc"
                parts.append(box(offset + j * cell, 62 + n * cell, cell - 4, cell - 4, fill, stroke))
        parts += [text(offset + (j + 0.45) * cell, 54, f"{inputs}[{j}]") for j in range(steps)]
    parts += [text(96, 62 + (n + 0.6) * cell, f"x[{n + 1}] =", anchor="end") for n in range(steps)]
    parts.append(text(300, 62 + 2.6 * cell, "+"))
    parts.append(text(290, 62 + (steps + 0.7) * cell, "one row: one step, from all states and outputs so far", ORANGE))
    return svg(500, 62 + (steps + 1) * cell + 8, parts)


def adjoint(steps: int = 4, gap: int = 125) -> str:
    """States that stay, network calls that come and go."""
    parts = [text(16, 30, "forward: K calls, no graph kept", BLUE, "start")]
    parts.append(text(16, 262, "backward: one graph at a time, rebuilt where it is needed", ORANGE, "start"))
    for n in range(steps + 1):
        x = 24 + n * gap
        parts += [box(x, 118, 56, 36, PALE, BLUE), text(x + 28, 141, f"x[{n}]")]
        if n < steps:
            parts += [line(x + 58, 130, x + gap - 4, 130, "blue"), line(x + gap - 2, 146, x + 62, 146, "orange")]
            parts += [box(x + 36, 52, 68, 34, "white", BLUE), text(x + 70, 74, f"F[{n}]")]
            parts += [line(x + 28, 116, x + 48, 90, "blue"), line(x + 88, 88, x + 104, 126, "blue")]
            kept = n == 1
            parts += [box(x + 36, 186, 68, 34, ORANGE if kept else "white", ORANGE)]
            parts += [text(x + 70, 208, f"graph {n}", "white" if kept else ORANGE)]
            parts += [line(x + 96, 150, x + 88, 184, "orange", "4 3"), line(x + 52, 184, x + 36, 158, "orange")]
    return svg(24 + steps * gap + 84, 280, parts)


def memory(steps: int = 6) -> str:
    """Live bytes over an iteration, by a graph's bytes and a state's."""
    parts = []
    for offset, title, kept in ((40, f"all {steps} graphs", steps), (360, "one graph", 1)):
        parts.append(text(offset + 130, 26, title))
        x, width = offset, 260 / (2 * steps)
        for n in [*range(1, steps + 1), *range(steps, 0, -1)]:
            graphs = n if kept == steps else (1 if x >= offset + width * (steps - 1) else 0)
            high = 22 * graphs
            parts.append(box(x, 190 - 4 * n - high, width - 2, high, ORANGE, "none"))
            parts.append(box(x, 190 - 4 * n, width - 2, 4 * n, BLUE, "none"))
            x += width
        parts.append(f'<path d="M{offset} 190 h260" stroke="{INK}"/>')
        parts += [text(offset + 65, 208, "forward"), text(offset + 195, 208, "backward")]
    parts += [box(40, 224, 12, 12, BLUE, "none"), text(58, 235, "states", anchor="start")]
    parts += [box(120, 224, 12, 12, ORANGE, "none"), text(138, 235, "network graphs; not to scale: a graph is larger", anchor="start")]
    return svg(660, 250, parts)


def main() -> None:
    for draw in (tableau, adjoint, memory):
        (PICTURES / f"{draw.__name__}.svg").write_text(draw())


if __name__ == "__main__":
    main()
