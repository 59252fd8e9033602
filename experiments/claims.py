"""Tests of rows: each returns whether something holds and the figures that say so, or None where rows are missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from experiment import Row

Check = Callable[[Sequence[Row]], "tuple[bool, str] | None"]


def at(rows: Sequence[Row], label: str, metric: str, over: str = "steps") -> dict[str, float]:
    """The figures of a label by K, or by another column."""
    return {row[over]: float(row[metric]) for row in rows if row["label"] == label and row.get(metric)}


def below(first: str, others: Sequence[str] = (), metric: str = "l1", over: str = "steps", kind: str = "") -> Check:
    """``first`` is below each of ``others``, or of all rows of a ``kind``, everywhere that both are."""

    def check(rows: Sequence[Row]) -> tuple[bool, str] | None:
        mine = at(rows, first, metric, over)
        named = {*others} | {row["label"] for row in rows if kind and row["kind"] == kind and row["label"] != first}
        said, holds = [], True
        for where, value in mine.items():
            found = {other: at(rows, other, metric, over).get(where) for other in sorted(named)}
            present = {other: figure for other, figure in found.items() if figure is not None}
            if present:
                best = min(present, key=present.__getitem__)
                holds &= value < present[best]
                nearer = [other for other in present if other != best and present[other] <= value]
                also = f"; below it also {', '.join(nearer)}" if nearer else ""
                said.append(f"{_place(over, where)}: {value:.4g} against {present[best]:.4g} ({best}{also})")
        return (holds, "; ".join(said)) if said else None

    return check


def outside(*pairs: tuple[str, str], metric: str = "l1", over: str = "model") -> Check:
    """Each label is below all classical rows at the place named with it."""

    def check(rows: Sequence[Row]) -> tuple[bool, str] | None:
        found = []
        for label, where in pairs:
            there = [row for row in rows if row.get(over) == where]
            found.append(below(label, metric=metric, over=over, kind="classical")(there))
        known = [one for one in found if one is not None]
        complete = len(known) == len(pairs)
        return (all(holds for holds, _ in known), "; ".join(said for _, said in known)) if complete else None

    return check


def within(share: float, first: str, other: str, metric: str = "l1", over: str = "steps") -> Check:
    """``first`` is at most ``1 + share`` times ``other`` wherever both are."""

    def check(rows: Sequence[Row]) -> tuple[bool, str] | None:
        mine, theirs = at(rows, first, metric, over), at(rows, other, metric, over)
        ratios = {where: mine[where] / theirs[where] for where in sorted(mine, key=float) if where in theirs}
        said = ", ".join(f"{ratio:.2f} ({_place(over, where)})" for where, ratio in ratios.items())
        return (max(ratios.values()) <= 1 + share, f"ratio {said}") if ratios else None

    return check


def moves_less(first: str, other: str, share: float, over: str = "train_samples", metric: str = "l1") -> Check:
    """From fewest to most samples, ``first`` changes by at most ``share``, or by less than ``other``."""

    def check(rows: Sequence[Row]) -> tuple[bool, str] | None:
        changes = {}
        for label in (first, other):
            found = at(rows, label, metric, over)
            if len(found) < 2:
                return None
            fewest, most = (found[key] for key in (min(found, key=int), max(found, key=int)))
            changes[label] = fewest / most - 1
        said = ", ".join(f"{label} {change:+.1%}" for label, change in changes.items())
        holds = abs(changes[first]) <= max(share, abs(changes[other]))
        return holds, f"with the fewest samples against the most: {said}"

    return check


def _place(over: str, where: str) -> str:
    return f"K = {where}" if over == "steps" else f"{over.replace('_', ' ')} {where}"
