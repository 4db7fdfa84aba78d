"""The phantom's body: a patient's proportions, and the healthy frontal chest drawn from them.

The patient faces the viewer, so the patient's right is on the image's left. Coordinates as in ``plate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.phantom.plate import Patch, Plate, Points, rounded

SIGN = {"right": -1.0, "left": 1.0}  # direction of a side on the image
# The inner chest wall: depth below the apex (as a share of 0.68 of the height), share of the half width.
_WALL = np.array([[0, 0.03, 0.1, 0.2, 0.35, 0.55, 0.8, 1.0], [0.4, 0.56, 0.7, 0.81, 0.91, 0.98, 1, 0.98]])


@dataclass(frozen=True)
class Patient:
    """What makes one phantom patient look different from another; every view of the patient shares it.

    ``half`` is the inner half width of the thorax, ``apex`` and ``dome`` the heights of the lung apex and of the right
    hemidiaphragm, ``heart`` the heart's width, ``knob`` the aortic knob's radius, ``rib_gap`` the distance between
    ribs, ``habitus`` the thickness of soft tissue (1 = average), ``seed`` fixes the vessels.
    """

    seed: int
    sex: str
    age: int
    half: float
    apex: float
    dome: float
    heart: float
    knob: float
    rib_gap: float
    rib_slope: float
    habitus: float


def draw_patient(rng: np.random.Generator) -> Patient:
    """Draw one patient: an adult of 20 to 89 years."""
    return Patient(
        seed=int(rng.integers(2**31)),
        sex="M" if rng.random() < 0.54 else "F",
        age=int(rng.integers(20, 90)),
        half=float(rng.uniform(0.365, 0.405)),
        apex=float(rng.uniform(0.115, 0.15)),
        dome=float(rng.uniform(0.665, 0.705)),
        heart=float(rng.uniform(0.315, 0.36)),
        knob=float(rng.uniform(0.030, 0.038)),
        rib_gap=float(rng.uniform(0.060, 0.068)),
        rib_slope=float(rng.uniform(0.85, 1.15)),
        habitus=float(rng.uniform(0.85, 1.15)),
    )


@dataclass
class Chest:
    """The geometry of one frontal view; findings reshape it before anything is drawn."""

    patient: Patient
    position: str
    centre: float = 0.5
    half: float = 0.38
    apex: float = 0.13
    dome: dict[str, float] = field(default_factory=dict)
    dome_rise: float = 0.085  # how far the costophrenic angle is below the dome
    heart: float = 0.33
    shift: float = 0.0  # of heart, trachea and great vessels; positive = to the patient's left
    mediastinum: float = 0.055
    knob: float = 0.034
    air: float = 0.26  # density of aerated lung
    vessels: float = 1.0  # strength of the vascular markings

    @classmethod
    def of(cls, patient: Patient, position: str) -> Chest:
        """The healthy chest of a patient: an AP film magnifies the heart and is taken in poorer inspiration."""
        lift, magnify = (0.035, 1.10) if position == "AP" else (0.0, 1.0)
        dome = {"right": patient.dome - lift, "left": patient.dome + 0.022 - lift}
        return cls(
            patient,
            position,
            half=patient.half,
            apex=patient.apex,
            dome=dome,
            heart=patient.heart * magnify,
            mediastinum=0.055 * magnify,
            knob=patient.knob,
        )

    def wall(self, y: npt.ArrayLike) -> Points:
        """Distance of the chest wall's inner side from the midline at height y."""
        return self.half * np.interp((np.asarray(y, float) - self.apex) / 0.68, *_WALL)

    def base(self, side: str, u: npt.ArrayLike) -> Points:
        """Height of the diaphragm at distance u from the midline."""
        u = np.asarray(u, float)
        peak = 0.5 * self.half
        lateral = self.dome_rise * np.clip((u - peak) / (self.half - peak), 0, None) ** 2.2
        medial = 0.6 * self.dome_rise * np.clip((peak - u) / peak, 0, None) ** 2
        return self.dome[side] + lateral + medial

    def outline(self, side: str) -> Points:
        """Closed outline of one lung, [n, 2]."""
        angle = self.dome[side] + self.dome_rise
        down = np.linspace(self.apex, angle, 16)
        u_wall = self.wall(down)
        along = np.linspace(self.wall(angle), 0.045, 12)
        medial = np.array([[0.05, 0.55], [0.06, 0.42], [0.06, 0.3], [0.075, self.apex + 0.05], [0.1, self.apex + 0.01]])
        u = np.concatenate([u_wall, along, medial[:, 0]])
        y = np.concatenate([down, self.base(side, along), medial[:, 1]])
        return np.stack([self.centre + SIGN[side] * u, y], 1)

    def spot(self, side: str, zone: str, across: float = 0.58, down: float = 0.0) -> tuple[float, float]:
        """A point in a lung: ``across`` 0 at the midline to 1 at the wall, ``down`` an offset in height."""
        t = {"upper": 0.2, "mid": 0.5, "lower": 0.8}[zone]
        y = self.apex + t * (self.dome[side] + 0.03 - self.apex) + down
        return self.centre + SIGN[side] * across * float(self.wall(y)), y

    def ribs(self, side: str, numbers: Sequence[int], anterior: bool = False) -> Points:
        """The courses of the numbered ribs (0..9), [n, 10, 2], each from its medial to its lateral end."""
        t = np.linspace(0, 1, 10)
        y0 = self.apex - 0.012 + np.asarray(numbers, float)[:, None] * self.patient.rib_gap
        if anterior:  # the anterior ends run downwards to the middle
            y = y0 + 0.115 + 0.075 * (1 - t) ** 1.3
            u = (0.4 + 0.6 * t) * self.wall(y0 + 0.11)
        else:
            y = y0 + self.patient.rib_slope * (0.105 * t**2.2 - 0.03 * np.sin(np.pi * t))
            u = (0.05 + 0.95 * t) * np.minimum(self.wall(y0 + 0.09) * 1.02, self.half)
        return np.stack([self.centre + SIGN[side] * u, y], 2)


def draw_lungs(plate: Plate, chest: Chest) -> None:
    """Soft tissue, the abdomen below the diaphragm, aerated lungs and their vessels."""
    c, out = chest.centre, chest.half + 0.035 + 0.03 * chest.patient.habitus
    right = [
        [0.12, 0],
        [0.13, 0.06],
        [0.26, 0.11],
        [0.4, 0.16],
        [0.47, 0.24],
        [out, 0.36],
        [out + 0.01, 0.7],
        [out + 0.04, 1.02],
    ]
    body = np.array([[c - u, y] for u, y in right] + [[c + u, y] for u, y in reversed(right)])
    plate.cover(plate.polygon(body, 0.012), 0.50 + 0.06 * chest.patient.habitus)
    plate.add(plate.ellipse(c, 1.02, 0.52, 0.36, soft=0.05), 0.08)
    for side in ("right", "left"):
        plate.lung[side] = plate.polygon(chest.outline(side), 0.004).whole(plate.density.shape)
    both = np.maximum(plate.lung["right"], plate.lung["left"])
    plate.lung["both"] = both
    plate.add(plate.polygon(_below(chest, "right"), 0.02), 0.07)  # liver
    plate.density += both * (np.float32(chest.air) - plate.density)
    grade = np.linspace(-0.03, 0.05, plate.height, dtype=np.float32)[:, None]  # bases are overlain by more tissue
    plate.density += both * (grade + 0.012 * plate.texture(0.08))
    for mask, amount in _vessels(plate, chest):
        plate.add(mask * both, amount * chest.vessels)
    if chest.patient.sex == "F":
        for side in ("right", "left"):
            x = c + SIGN[side] * 0.62 * chest.half
            plate.add(plate.ellipse(x, 0.62, 0.19, 0.17, soft=0.025), 0.05)
    x, y = c + 0.5 * chest.half, chest.dome["left"] + 0.075
    plate.add(plate.ellipse(x, y, 0.085, 0.045, soft=0.008), -0.22)  # gas in the stomach


def _below(chest: Chest, side: str) -> Points:
    u = np.linspace(0, chest.half, 10)
    top = np.stack([chest.centre + SIGN[side] * u, chest.base(side, u)], 1)
    return np.concatenate([top, [[chest.centre + SIGN[side] * chest.half, 1.0], [chest.centre, 1.0]]])


def _vessels(plate: Plate, chest: Chest) -> list[tuple[Patch, float]]:
    """Branching vessels from both hila, thick to thin; the tree is the patient's, the same in every view."""
    rng = np.random.default_rng(chest.patient.seed)
    t = np.linspace(0, 1, 6)
    trunks, twigs = [], []
    for side in ("right", "left"):
        s, x, y = SIGN[side], chest.centre + chest.shift + SIGN[side] * 0.095, 0.42 if side == "right" else 0.395
        angle = np.deg2rad(np.linspace(-72, 80, 8) + rng.uniform(-6, 6, 8))[:, None]
        length = rng.uniform(0.19, 0.27, (8, 1)) * np.where(angle > 0.5, 1.15, 1.0) * t
        bend = angle + rng.uniform(-0.7, 0.7, (8, 1)) * t**1.5
        trunk = np.stack([x + s * length * np.cos(bend), y + 0.83 * length * np.sin(bend)], 2)
        way = (angle + np.array([-0.6, 0.55, -0.35, 0.4]))[:, :, None]
        reach = rng.uniform(0.08, 0.14, (8, 4, 1)) * t
        root = trunk[np.arange(8)[:, None], rng.integers(2, 5, (8, 4))][:, :, None]
        twigs.append((root + np.stack([s * reach * np.cos(way), 0.83 * reach * np.sin(way)], 3)).reshape(-1, 6, 2))
        trunks.append(trunk)
    trunk, twig = np.concatenate(trunks), np.concatenate(twigs)
    return [
        (plate.lines(trunk[:, :4], 0.015, 0.006), 0.14),
        (plate.lines(trunk, 0.007, 0.003), 0.11),
        (plate.lines(twig, 0.004, 0.002), 0.10),
    ]


def draw_mediastinum(plate: Plate, chest: Chest) -> None:
    """Hila, heart, great vessels, aortic knob, trachea and carina."""
    c, w = chest.centre + chest.shift, chest.heart
    aspect = plate.width / plate.height
    for side, y in (("right", 0.43), ("left", 0.4)):
        plate.dense(plate.ellipse(c + SIGN[side] * 0.085, y, 0.042, 0.062, soft=0.012), 0.47)
    m = chest.mediastinum
    floor = chest.dome["left"]
    low = floor - 0.5 * w * aspect  # centre of the ventricles
    right, left = c - 0.33 * w - 0.012, c + 0.67 * w
    heart = [
        [c - m * 0.8, 0.40],
        [c - 0.6 * m - 0.04, 0.455],
        [right + 0.005, low - 0.03],
        [right, low + 0.04],
        [right + 0.03, floor + 0.02],
        [c + 0.1 * w, floor + 0.05],
        [left - 0.07, floor + 0.045],
        [left - 0.012, floor + 0.005],
        [left, floor - 0.035],
        [left - 0.025, low + 0.015],
        [left - 0.09, low - 0.045],
        [c + 0.078, 0.445],
        [c + m * 1.1, 0.39],
    ]
    plate.dense(plate.polygon(rounded(np.array(heart)), 0.009), 0.66)
    upper = [
        [c - 0.9 * m, 0.10],
        [c + 0.9 * m, 0.10],
        [c + m, 0.25],
        [c + m * 1.05, 0.47],
        [c - m * 1.05, 0.47],
        [c - m, 0.25],
    ]
    plate.dense(plate.polygon(np.array(upper), 0.012), 0.60)
    k = chest.knob
    plate.dense(plate.circles([(c + m + 0.25 * k, 0.285 + 0.25 * k)], [k * 1.15], 0.005), 0.68)
    if k > 0.05:  # a dilated aorta bulges to the right as well, where it ascends
        plate.dense(plate.ellipse(c - m + 0.01, 0.37, 0.75 * k, 0.085, soft=0.006), 0.66)
    descending = [
        [c + m + k * 0.8, 0.29],
        [c + 0.052 + 0.9 * k - 0.02, 0.42],
        [c + 0.045 + 0.5 * k, 0.55],
        [c + 0.05, 0.75],
    ]
    plate.add(plate.lines([np.array(descending)], 0.006, 0.003), 0.07)
    plate.dense(plate.ellipse(c + 0.078, 0.37, 0.03, 0.04, soft=0.008), 0.60)  # pulmonary trunk
    t = chest.centre + chest.shift * 1.15
    plate.add(plate.lines([np.array([[t, -0.02], [t, 0.35]])], 0.042, 0.004), -0.16)
    bronchi = [np.array([[t, 0.345], [t - 0.075, 0.425]]), np.array([[t, 0.345], [t + 0.085, 0.415]])]
    plate.add(plate.lines(bronchi, 0.024, 0.005), -0.11)


def draw_bones(plate: Plate, chest: Chest) -> None:
    """Spine, posterior and anterior ribs, clavicles and the medial scapular borders."""
    c = chest.centre
    plate.add(plate.lines([np.array([[c, -0.02], [c, 1.02]])], 0.085, 0.006), 0.055)
    y = np.arange(0.03, 1.0, 0.058)
    discs = np.stack([np.stack([np.full(len(y), c + e), y], 1) for e in (-0.04, 0.04)], 1)
    plate.add(plate.lines(discs, 0.010, 0.003), -0.05)
    plate.add(plate.circles(np.stack([np.full(len(y), c), y + 0.029], 1), 0.008, 0.003), 0.05)
    ribs = np.concatenate([chest.ribs(side, range(10)) for side in ("right", "left")])
    over = 0.045 + 0.04 * plate.lung["both"]  # bone stands out more against air
    plate.add(plate.lines(ribs, 0.030, 0.002) * over, 1.0)
    plate.add(plate.lines(ribs, 0.016, 0.003) * over, -0.45)
    fronts = np.concatenate([chest.ribs(side, range(1, 6), True) for side in ("right", "left")])
    plate.add(plate.lines(fronts, 0.030, 0.006), 0.035)
    for side in ("right", "left"):
        s = SIGN[side]
        collar = np.array([[0.045, 0.19], [0.12, 0.168], [0.2, 0.162], [0.28, 0.14], [0.36, 0.132]])
        course = np.stack([c + s * collar[:, 0], collar[:, 1] + 0.01], 1)
        plate.add(plate.lines([course], 0.036, 0.002), 0.14)
        plate.add(plate.lines([course], 0.018, 0.004), -0.05)
        blade = np.stack([c + s * np.array([0.33, 0.36, 0.42, 0.46]), [0.16, 0.26, 0.36, 0.44]], 1)
        plate.add(plate.lines([blade], 0.014, 0.004), 0.045)
