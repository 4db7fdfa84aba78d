"""What can be wrong with a phantom: the findings, their laterality, zone and severity, and how each reshapes the chest.

How a finding is painted is in ``frontal`` and ``profile``; which labels it gets is in ``labels``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.phantom.anatomy import SIGN, Chest
from pipeline.phantom.lateral import Profile


@dataclass(frozen=True)
class Finding:
    """One drawn and reported finding. ``side`` is the patient's; an attribute that does not apply is "".

    ``variant`` is the device shown. ``seed`` fixes place and shape, so that all views of a study agree.
    """

    kind: str
    side: str = ""
    zone: str = ""
    severity: str = ""
    variant: str = ""
    seed: int = 0

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides to draw on."""
        return ("right", "left") if self.side == "bilateral" else (self.side,) if self.side else ()

    @property
    def grade(self) -> int:
        """Severity as 0, 1 or 2."""
        return {"small": 0, "mild": 0, "moderate": 1, "": 1, "large": 2, "severe": 2}[self.severity]


_ONE = ("right", "left")
_ANY = ("right", "left", "bilateral")
_ZONES = ("upper", "mid", "lower")
_SIZE = ("small", "moderate", "large")
_DEGREE = ("mild", "moderate", "severe")
_NONE = ("",)

# kind -> sides, zones, severities it may have
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "cardiomegaly": (_NONE, _NONE, _DEGREE),
    "enlarged cardiomediastinum": (_NONE, _NONE, _DEGREE),
    "pleural effusion": (_ANY, _NONE, _SIZE),
    "pneumothorax": (_ONE, _NONE, _SIZE),
    "consolidation": (_ONE, _ZONES, _NONE),
    "pneumonia": (_ANY, ("mid", "lower", "upper"), _NONE),
    "edema": (_NONE, _NONE, _DEGREE),
    "atelectasis": (_ANY, ("lower", "mid"), _DEGREE),
    "nodule": (_ONE, _ZONES, _NONE),
    "mass": (_ONE, _ZONES, _NONE),
    "lung tumor": (_ONE, _ZONES, _NONE),
    "lung opacity": (_ONE, _ZONES, _NONE),
    "infiltration": (_ANY, _ZONES, _NONE),
    "rib fracture": (_ONE, _ZONES, _NONE),
    "support devices": (_NONE, _NONE, _NONE),
    "emphysema": (_NONE, _NONE, _DEGREE),
    "pulmonary fibrosis": (("bilateral",), ("lower",), _DEGREE),
    "ild": (("bilateral",), _NONE, _DEGREE),
    "pleural thickening": (_ANY, _NONE, _NONE),
    "hiatal hernia": (_NONE, _NONE, _SIZE),
    "aortic enlargement": (_NONE, _NONE, _DEGREE),
    "calcification": (_ONE, _ZONES, _NONE),
    "mediastinal shift": (_ONE, _NONE, _NONE),
    "tuberculosis": (_ANY, ("upper",), _NONE),
}
DEVICES = ("pacemaker", "central line", "endotracheal tube", "sternal wires")
# What may not be drawn together: the two would hide or contradict each other.
EXCLUSIVE = (
    {"emphysema", "cardiomegaly", "edema", "pulmonary fibrosis"},
    {"emphysema", "ild"},
    {"edema", "ild", "pulmonary fibrosis"},
    {"nodule", "mass", "lung tumor"},
    {"pneumothorax", "pleural thickening"},
)


def draw_finding(kind: str, rng: np.random.Generator) -> Finding:
    """Draw side, zone, severity and place of one finding of a kind."""
    sides, zones, degrees = KINDS[kind]
    weights = [0.4, 0.4, 0.2][: len(sides)] if len(sides) == 3 else None
    return Finding(
        kind,
        str(rng.choice(sides, p=weights)),
        str(rng.choice(zones)),
        str(rng.choice(degrees)),
        str(rng.choice(DEVICES)) if kind == "support devices" else "",
        int(rng.integers(2**31)),
    )


def compatible(kind: str, present: list[Finding]) -> bool:
    """Whether a finding of this kind can be drawn beside those present."""
    kinds = {f.kind for f in present}
    return kind not in kinds and not any(kind in group and kinds & group for group in EXCLUSIVE)


def reshape_frontal(finding: Finding, chest: Chest) -> None:
    """Change the geometry of a frontal chest the way the finding does."""
    g = finding.grade
    match finding.kind:
        case "cardiomegaly":
            chest.heart *= 1.34 + 0.11 * g
        case "enlarged cardiomediastinum":
            chest.mediastinum *= 2.4 + 0.25 * g
        case "atelectasis":
            for side in finding.sides:
                chest.dome[side] -= 0.035 + 0.015 * g
        case "emphysema":
            for side in chest.dome:
                chest.dome[side] += 0.075
            chest.dome_rise *= 0.35
            chest.heart *= 0.78
            chest.air -= 0.09
            chest.half = min(chest.half * 1.05, 0.42)
            chest.vessels *= 0.55
        case "pulmonary fibrosis":
            for side in chest.dome:
                chest.dome[side] -= 0.03 + 0.01 * g
        case "edema":
            chest.vessels *= 1.5
            chest.air += 0.03
        case "aortic enlargement":
            chest.knob *= 2.3 + 0.25 * g
        case "mediastinal shift":
            chest.shift += SIGN[finding.side] * 0.095


def reshape_lateral(finding: Finding, chest: Profile) -> None:
    """Change the geometry of a lateral chest the way the finding does."""
    g = finding.grade
    match finding.kind:
        case "cardiomegaly":
            chest.heart *= 1.28 + 0.09 * g
        case "enlarged cardiomediastinum":
            chest.mediastinum *= 1.5 + 0.2 * g
        case "atelectasis" | "pulmonary fibrosis":
            chest.dome -= 0.03
        case "emphysema":
            chest.dome += 0.05
            chest.flat = 0.25
            chest.heart *= 0.85
            chest.air -= 0.09
            chest.depth = 0.04
            chest.vessels *= 0.55
        case "edema":
            chest.vessels *= 1.5
            chest.air += 0.03
        case "aortic enlargement":
            chest.knob *= 1.7 + 0.2 * g
