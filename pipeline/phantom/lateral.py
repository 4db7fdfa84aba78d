"""The healthy lateral chest; the patient faces the image's left. Coordinates as in ``anatomy``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.phantom.anatomy import Patient
from pipeline.phantom.plate import Plate, Points, rounded


@dataclass
class Profile:
    """The geometry of one lateral view; findings reshape it before anything is drawn."""

    patient: Patient
    dome: float = 0.70
    flat: float = 1.0  # 1 = arched diaphragm, 0 = flat
    heart: float = 1.0
    knob: float = 0.034
    mediastinum: float = 0.055
    air: float = 0.29
    depth: float = 0.0  # how much the chest is deepened (barrel chest)
    vessels: float = 1.0

    @classmethod
    def of(cls, patient: Patient) -> Profile:
        """The healthy lateral chest of a patient."""
        return cls(patient, dome=patient.dome + 0.02, heart=patient.heart / 0.337, knob=patient.knob)

    def base(self, x: Points) -> Points:
        """Height of the diaphragm at x: an arch in front, falling to the posterior costophrenic angle."""
        rise = np.interp(x, [0.2, 0.32, 0.45, 0.6, 0.72, 0.83], [0.035, 0.008, 0.0, 0.03, 0.085, 0.165])
        return self.dome + self.flat * rise + (1 - self.flat) * 0.09

    def outline(self) -> Points:
        """Closed outline of the lungs, [n, 2]."""
        a = self.patient.apex
        front = [
            [0.45, a],
            [0.35, a + 0.05],
            [0.27 - self.depth, a + 0.14],
            [0.21 - self.depth, a + 0.28],
            [0.2 - self.depth, 0.6],
        ]
        x = np.linspace(0.21 - self.depth, 0.83, 14)
        back = [[0.84, 0.66], [0.83, 0.45], [0.79, 0.3], [0.71, a + 0.06], [0.6, a]]
        return np.concatenate([front, np.stack([x, self.base(x)], 1), back])

    def spot(self, zone: str, deep: float) -> tuple[float, float]:
        """A point in the lung: ``deep`` 0 at the front wall to 1 at the back wall."""
        y = self.patient.apex + {"upper": 0.2, "mid": 0.5, "lower": 0.82}[zone] * (self.dome + 0.03 - self.patient.apex)
        left, right = (0.36, 0.7) if zone == "upper" else (0.24, 0.8)
        return left + deep * (right - left), y


def draw_lungs(plate: Plate, chest: Profile) -> None:
    """Soft tissue with the raised arms, abdomen, aerated lungs and vessels."""
    d = chest.depth
    front = [[0.36, 0], [0.3, 0.08], [0.18 - d, 0.22], [0.12 - d, 0.42], [0.115 - d, 0.62], [0.1, 0.8], [0.08, 1.02]]
    back = [[0.93, 1.02], [0.94, 0.7], [0.95, 0.4], [0.9, 0.2], [0.8, 0.08], [0.78, 0]]
    plate.cover(plate.polygon(rounded(np.array(front + back)), 0.012), 0.56)
    plate.add(plate.ellipse(0.68, 0.05, 0.26, 0.13, soft=0.03), 0.10)  # shoulders
    plate.add(plate.ellipse(0.5, 1.0, 0.5, 0.32, soft=0.04), 0.10)
    lung = plate.polygon(chest.outline(), 0.005).whole(plate.density.shape)
    plate.lung = {"right": lung, "left": lung, "both": lung}
    plate.density += lung * (np.float32(chest.air) - plate.density)
    back_heavy = np.linspace(-0.02, 0.05, plate.width, dtype=np.float32)[None, :]
    dark_below = np.linspace(0.07, -0.05, plate.height, dtype=np.float32)[:, None]  # the spine darkens downwards
    plate.density += lung * (back_heavy + dark_below + 0.012 * plate.texture(0.08))
    rng = np.random.default_rng(chest.patient.seed)
    step = np.linspace(0, 1, 5)
    angle = np.linspace(0, 2 * np.pi, 22, endpoint=False) + rng.uniform(-0.1, 0.1, 22)
    length = rng.uniform(0.14, 0.25, (22, 1)) * step
    bend = angle[:, None] + rng.uniform(-0.4, 0.4, (22, 1)) * step
    twigs = np.stack([0.52 + length * np.cos(bend), 0.42 + 0.83 * length * np.sin(bend)], 2)
    plate.add(plate.lines(twigs, 0.007, 0.003) * lung, 0.12 * chest.vessels)
    plate.add(plate.ellipse(0.42, chest.dome + 0.075, 0.08, 0.035, soft=0.008), -0.2)  # gas in the stomach


def draw_mediastinum(plate: Plate, chest: Profile) -> None:
    """Heart behind the sternum, aortic arch, hila and trachea."""
    h, lung = chest.heart, plate.lung["both"]
    y = chest.dome - 0.105 * h
    plate.dense(
        plate.ellipse(0.275 + 0.13 * h, y + 0.02, 0.17 * h, 0.15 * h, -38, 0.012) * np.maximum(lung, np.float32(0.4)),
        0.62,
    )
    wide = chest.mediastinum / 0.055
    plate.dense(plate.ellipse(0.46, 0.33, 0.085 * wide, 0.15, 8, 0.02), 0.36 + 0.08 * wide)
    k = chest.knob / 0.034
    plate.dense(plate.ellipse(0.5, 0.285, 0.05 * k, 0.055 * k, soft=0.008), 0.56)
    aorta = np.array([[0.53, 0.29], [0.6, 0.36], [0.65, 0.5], [0.66, 0.7]])
    plate.add(plate.lines([aorta], 0.05 * k, 0.008), 0.07)
    plate.dense(plate.ellipse(0.53, 0.42, 0.055, 0.06, soft=0.012), 0.55)
    plate.add(plate.lines([np.array([[0.5, -0.02], [0.52, 0.2], [0.54, 0.4]])], 0.04, 0.004), -0.15)


def draw_bones(plate: Plate, chest: Profile) -> None:
    """Vertebrae, sternum, ribs crossing the lung, and the scapulae."""
    y = np.arange(0.04, 1.0, 0.064)
    x = np.interp(y, [0, 0.3, 0.6, 1.0], [0.68, 0.77, 0.78, 0.7])
    blocks = np.stack([np.stack([x + e, y], 1) for e in (-0.035, 0.035)], 1)
    plate.add(plate.lines(blocks, 0.055, 0.003), 0.10)
    plate.add(plate.lines(blocks, 0.036, 0.004), -0.035)
    d = chest.depth
    sternum = np.array([[0.3 - d, 0.19], [0.215 - d, 0.32], [0.165 - d, 0.52]])
    plate.add(plate.lines([sternum], 0.03, 0.004), 0.13)
    t = np.linspace(0, 1, 8)
    top = chest.patient.apex + 0.02 + np.arange(9)[:, None] * chest.patient.rib_gap
    ribs = np.stack(np.broadcast_arrays(0.86 - 0.62 * t, top + 0.14 * t**1.3), 2)
    plate.add(plate.lines(ribs, 0.022, 0.004), 0.04)
    plate.add(plate.lines([np.array([[0.78, 0.1], [0.84, 0.24], [0.88, 0.34]])], 0.03, 0.006), 0.08)
    second = np.linspace(0.22, 0.82, 10)
    plate.add(plate.lines([np.stack([second, chest.base(second) + 0.025], 1)], 0.006, 0.003), 0.06)
