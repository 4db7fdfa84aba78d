"""The account of an archive: what its lists say, what of it was written, what was lost and why.

found = written + rejected holds for images, rows, texts and labels alike; what is lost whole is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.study import NEGATIVE, POSITIVE, SPLITS, UNCERTAIN, Reject, Study

VALUES = {"positive": POSITIVE, "negative": NEGATIVE, "uncertain": UNCERTAIN}


@dataclass
class Tally:
    """What some studies hold."""

    studies: Counter[str] = field(default_factory=Counter)  # by split
    images: Counter[str] = field(default_factory=Counter)
    views: Counter[str] = field(default_factory=Counter)  # images by position
    texts: int = 0  # studies with findings or impression
    labels: dict[str, Counter[int]] = field(default_factory=dict)  # class -> value -> studies

    def add(self, study: Study) -> None:
        """Count a study."""
        self.studies[study.split] += 1
        self.images[study.split] += len(study.views)
        self.views.update(view.position for view in study.views)
        self.texts += study.findings is not None or study.impression is not None
        for cls, value in study.labels.items():
            self.labels.setdefault(cls, Counter())[value] += 1

    def by_split(self) -> dict[str, dict[str, int]]:
        """Split -> studies and images."""
        return {split: {"studies": self.studies[split], "images": self.images[split]} for split in SPLITS}

    def classes(self) -> dict[str, dict[str, int]]:
        """Class -> studies that are positive, negative and uncertain of it, and those that do not mention it."""
        every = self.studies.total()
        return {
            cls: {**{name: values[value] for name, value in VALUES.items()}, "blank": every - values.total()}
            for cls, values in self.labels.items()
        }


def summary_of(
    listed: Tally, written: Tally, rows: int, rejects: Sequence[Reject], labels_only: bool
) -> dict[str, Any]:
    """The counts of an ingest, for its summary.

    Args:
        rows: of the lists that say which images there are.
    """
    kinds = Counter(reject.kind for reject in rejects)
    unread = kinds["text"]
    account = {"rows": _settled(rows, rows - kinds["row"])}
    if not labels_only:
        values = [sum(values.total() for values in tally.labels.values()) for tally in (listed, written)]
        account["texts"] = _settled(listed.texts + unread, written.texts)
        account["labels"] = _settled(*values)
    found = 0 if labels_only else listed.images.total()
    return {
        "listed": listed.by_split(),
        "written": written.by_split(),
        "found_images": found,
        "written_images": written.images.total(),
        "rejected_images": kinds["image"],
        "account": account,
        "views": {"listed": dict(sorted(listed.views.items())), "written": dict(sorted(written.views.items()))},
        "classes": (listed if labels_only else written).classes(),
        "reasons": dict(sorted(Counter(r.reason for r in rejects if r.kind != "mended").items())),
        "mended": dict(sorted(Counter(r.reason for r in rejects if r.kind == "mended").items())),
    }


def _settled(found: int, written: int) -> dict[str, int]:
    return {"found": found, "written": written, "rejected": found - written}


def losses(listed: Tally, written: Tally, rows: int, rejects: Sequence[Reject], most: float) -> list[str]:
    """What an archive has lost more of than it may; one clause each.

    Args:
        most: share of its images, and of its rows, that may be rejected.
    """
    kinds = Counter(reject.kind for reject in rejects)
    said = []
    for what, kind, found in (("images", "image", listed.images.total()), ("rows", "row", rows)):
        if found and kinds[kind] / found > most:
            said.append(
                f"{kinds[kind] / found:.1%} of {found} {what} rejected, more than ingest.max_rejected = {most:.1%}"
                f"{_commonest(rejects, kind)}"
            )
    if not listed.studies.total():
        return said
    # Of several studies: one bad file never stops an archive.
    said += [f"split {s} is lost" for s in SPLITS if listed.studies[s] > 1 and not written.studies[s]]
    if listed.texts + kinds["text"] > 1 and not written.texts:
        said.append(f"all texts are lost{_commonest(rejects, 'text')}")
    for cls, values in listed.labels.items():
        if values[POSITIVE] > 1 and not written.labels.get(cls, Counter[int]())[POSITIVE]:
            said.append(f"class {cls[:100]} has lost all its positive studies")
    return said


def _commonest(rejects: Iterable[Reject], kind: str) -> str:
    """The commonest reasons of a kind; of images, also of files that cannot be read, as it may be why they lack."""
    found = [
        reason
        for one, n in ((kind, 3), *((("file", 1),) if kind == "image" else ()))
        for reason in Counter(r.reason for r in rejects if r.kind == one).most_common(n)
    ]
    return f" ({'; '.join(f'{reason}: {n}' for reason, n in found)})" if found else ""


def as_text(summary: dict[str, Any]) -> str:
    """The summary as one screen of text: counts per split and per reason."""
    lines = [f"{summary['dataset']}{' (phantom)' if summary['phantom'] else ''}", ""]
    lines.append(f"  {'split':<8}{'studies':>10}{'images':>10}{'written':>10}{'images':>10}")
    for split in SPLITS:
        listed, written = summary["listed"][split], summary["written"][split]
        counts = (listed["studies"], listed["images"], written["studies"], written["images"])
        lines.append(f"  {split:<8}" + "".join(f"{n:>10,}" for n in counts))
    if summary["labels_only"]:
        lines.append("  label files only: no image was opened")
    else:
        images = {name: summary[f"{name}_images"] for name in ("found", "written", "rejected")}
        for what, counts in (("images", images), *summary["account"].items()):
            if counts["found"]:
                lines.append(
                    f"  {what}: {counts['found']:,} found = {counts['written']:,} written + "
                    f"{counts['rejected']:,} rejected"
                )
    top = sorted(summary["reasons"].items(), key=lambda item: -item[1])
    lines += [f"  {n:>8,} x {reason}" for reason, n in top[:12]]
    lines += [f"  {n:>8,} x {reason} (used)" for reason, n in summary["mended"].items()]
    lines += [f"  note: {note}" for note in summary["notes"]]
    return "\n".join(lines)
