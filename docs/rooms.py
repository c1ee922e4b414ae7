"""Draws the rooms of the package and which imports which: ``python docs/rooms.py rooms.svg``.

1. Read from every file which names it takes from which room's door.
2. Put each room above all that it imports.
3. Draw a box per room, and a line per pair of rooms: the thicker, the more names.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "tensorlens_tl"
WIDTH, HEIGHT, COLUMN, ROW = 150, 40, 190, 84


def imports(package: Path) -> dict[tuple[str, str], set[str]]:
    """Names that a room takes from another, by (room, other room)."""
    taken = defaultdict(set)
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[0] == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == len(parts):
                names = {alias.name for alias in node.names}
                for room in [node.module] if node.module else names:
                    if room != parts[0]:
                        taken[parts[0], room] |= names
    return taken


def levels(taken: dict[tuple[str, str], set[str]]) -> dict[str, int]:
    """Every room's height: one more than the highest room that it imports."""
    rooms = {room for pair in taken for room in pair}
    height = dict.fromkeys(rooms, 0)
    for _ in rooms:
        for above, below in taken:
            height[above] = max(height[above], height[below] + 1)
    return height


def draw(package: Path = PACKAGE) -> str:
    """The picture as SVG."""
    # 1. What each room takes.
    taken = imports(package)
    # 2. Heights.
    height = levels(taken)
    rows = [sorted(r for r in height if height[r] == h) for h in range(max(height.values()) + 1)]
    most = max(map(len, rows))
    place = {
        room: ((i + (most - len(row)) / 2) * COLUMN + 20, (len(rows) - 1 - h) * ROW + 20)
        for h, row in enumerate(rows)
        for i, room in enumerate(row)
    }
    # 3. The drawing.
    lines, boxes = [], []
    for (above, below), names in sorted(taken.items()):
        (x, y), (u, v) = place[above], place[below]
        x, u, y = x + WIDTH / 2, u + WIDTH / 2, y + HEIGHT
        bend = 70 * (height[above] - height[below] - 1) * (1 if u >= x else -1)
        lines.append(
            f'<path d="M{x:.0f} {y} C{x + bend:.0f} {y + 40} {u + bend:.0f} {v - 40} {u:.0f} {v}" '
            f'stroke-width="{0.6 + len(names) ** 0.5 / 2:.1f}">'
            f"<title>{above} takes {len(names)} names from {below}</title></path>"
        )
    for room, (x, y) in place.items():
        middle = f'x="{x + WIDTH / 2:.0f}" y="{y + HEIGHT / 2 + 5:.0f}"'
        boxes.append(f'<rect x="{x:.0f}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>')
        boxes.append(f"<text {middle}>{room}</text>")
    size = f"{most * COLUMN + 20} {len(rows) * ROW}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" '
        f'aria-label="Rooms of the package, each above what it imports">'
        "<style>path{fill:none;stroke:#7a8ba3}rect{fill:#f4f6fa;stroke:#34496b}"
        "text{font:15px sans-serif;text-anchor:middle;fill:#1b2a41}</style>"
        + "".join(lines + boxes)
        + "</svg>\n"
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(), encoding="utf-8")
