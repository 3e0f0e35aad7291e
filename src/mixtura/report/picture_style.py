"""How all pictures look, and how they are written."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mixtura.files import replacing

INK, SOFT, GRID = "#1f2328", "#59636e", "#e3e6ea"


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG file, whole or not at all."""
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        # Without the writer's version the same numbers give the same bytes.
        figure.savefig(temporary, format="png", dpi=160, facecolor="white", metadata={"Software": None})


def style(axes: Any) -> None:
    """Two soft sides and a grid."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, labelsize=9, length=0)


def plain(text: str) -> str:
    """Matplotlib reads `$...$` as mathematics, and leaves a label out that begins with an underscore."""
    return text.replace("$", r"\$").lstrip("_")
