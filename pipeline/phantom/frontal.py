"""How each finding is painted on a frontal view. Extents are generous: the pictures are looked at 80 pixels wide."""

from __future__ import annotations

import numpy as np

from pipeline.phantom.anatomy import SIGN, Chest
from pipeline.phantom.findings import Finding
from pipeline.phantom.plate import Image, Patch, Plate, Points, curve


def paint_lung(f: Finding, plate: Plate, chest: Chest) -> None:
    """Paint what is in the lung or the pleura: below heart, mediastinum and ribs."""
    rng, g = plate.rng, f.grade
    for side in f.sides:
        lung = plate.lung[side]
        match f.kind:
            case "pleural effusion":
                plate.dense(plate.polygon(_fluid(chest, side, (0.08, 0.18, 0.34)[g]), 0.006), 0.74)
            case "pneumothorax":
                _pneumothorax(plate, chest, side, (0.125, 0.175, 0.225)[g])
            case "consolidation":
                x, y = chest.spot(side, f.zone, rng.uniform(0.5, 0.62), rng.uniform(-0.02, 0.02))
                mask = plate.blob(x, y, 0.16, 0.22, 0.012, 1.1) * lung
                plate.dense(mask, 0.73)
                hilum = np.array([chest.centre + SIGN[side] * 0.1, 0.42])
                bronchogram(plate, mask, np.array([x, y]), hilum)
            case "pneumonia":
                x, y = chest.spot(side, f.zone, rng.uniform(0.52, 0.62), rng.uniform(-0.02, 0.02))
                mask = plate.blob(x, y, 0.195, 0.18, 0.035) * lung
                patches = np.clip(0.55 + 0.5 * plate.texture(0.075), 0, 1.1)
                plate.dense(mask * patches, 0.74)
                plate.mark(f.kind, mask.whole(lung.shape))
            case "atelectasis":
                _plates(plate, chest, f, side)
            case "nodule":
                x, y = chest.spot(side, f.zone, rng.uniform(0.5, 0.7), rng.uniform(-0.03, 0.03))
                plate.cover(plate.circles([(x, y)], [0.053], 0.003), 0.76)
            case "mass":
                x, y = chest.spot(side, f.zone, rng.uniform(0.52, 0.64), rng.uniform(-0.02, 0.02))
                plate.cover(plate.blob(x, y, 0.105, 0.08, 0.005), 0.77)
            case "lung tumor":
                x, y = chest.spot(side, f.zone, rng.uniform(0.5, 0.6), rng.uniform(-0.02, 0.02))
                spikes = rays(plate, x, y, 14, 0.05, 0.16)
                plate.dense(plate.lines(spikes, 0.009, 0.002) * lung, 0.70)
                plate.cover(plate.blob(x, y, 0.078, 0.22, 0.003) * lung, 0.80)
            case "lung opacity":
                x, y = chest.spot(side, f.zone, rng.uniform(0.5, 0.62), rng.uniform(-0.02, 0.02))
                plate.dense(plate.ellipse(x, y, 0.14, 0.15, soft=0.035) * lung, 0.52)
            case "infiltration":
                x, y = chest.spot(side, f.zone, 0.55, rng.uniform(-0.02, 0.02))
                mask = plate.blob(x, y, 0.215, 0.15, 0.03) * lung
                plate.dense(mask * np.clip(0.25 + 0.7 * plate.texture(0.035), 0, 1), 0.70)
            case "pleural thickening":
                rind = plate.polygon(_rind(chest, side), 0.004)
                plate.dense(rind, 0.80)
            case "pulmonary fibrosis":
                _fibrosis(plate, chest, side, g)
            case "ild":
                _interstitial(plate, chest, side, g)
            case "tuberculosis":
                _cavity(plate, chest, side)
            case "calcification":
                x, y = chest.spot(side, f.zone, rng.uniform(0.45, 0.62), rng.uniform(-0.02, 0.02))
                spots = np.array([x, y]) + rng.normal(0, 1, (12, 2)) * (0.05, 0.042)
                plate.cover(plate.circles(spots, rng.uniform(0.013, 0.022, 12), 0.0015), 1.05)
    if f.kind == "edema":
        _edema(plate, chest, g)


def paint_heart(f: Finding, plate: Plate, chest: Chest) -> None:
    """Paint what is in or behind the heart and mediastinum."""
    if f.kind == "hiatal hernia":
        r = (0.085, 0.1, 0.115)[f.grade]
        x, y = chest.centre + chest.shift + 0.035, chest.dome["left"] - 0.05
        sac = plate.circles([(x, y)], [r], 0.003)
        plate.cover(sac, 0.83)
        top = round(y * plate.height)
        level = plate.circles([(x, y)], [r * 0.84], 0.002)
        level.values[max(top - level.top, 0) :] = 0  # gas above, fluid below, a horizontal level between
        plate.cover(level, 0.27)


def paint_top(f: Finding, plate: Plate, chest: Chest) -> None:
    """Paint what is in front of everything: fractured ribs and devices."""
    if f.kind == "rib fracture":
        for side in f.sides:
            _fracture(plate, chest, f, side)
    elif f.kind == "support devices":
        _device(plate, chest, f.variant)


def _fluid(chest: Chest, side: str, depth: float) -> Points:
    """Pleural fluid: a level that climbs along the chest wall (the meniscus) and fills the costophrenic angle."""
    t = np.linspace(0, 1, 14)
    level = chest.dome[side] + 0.055 - depth
    u = t * 1.01 * chest.half
    top = level + 0.03 * (1 - t) - 0.085 * t**5
    u = np.minimum(u, chest.wall(top) + 0.004)
    rim = np.stack([chest.centre + SIGN[side] * u, top], 1)
    down = np.linspace(top[-1], chest.dome[side] + chest.dome_rise + 0.01, 6)
    wall = np.stack([chest.centre + SIGN[side] * (chest.wall(down) + 0.004), down], 1)
    floor = np.stack([chest.centre + SIGN[side] * u[::-1], chest.base(side, u[::-1]) + 0.012], 1)
    return np.concatenate([rim, wall, floor])


def _pneumothorax(plate: Plate, chest: Chest, side: str, depth: float) -> None:
    """A black margin without vessels along apex and lateral wall, a fine pleural line, a denser collapsed lung."""
    lung, s = plate.lung[side], SIGN[side]
    y = np.linspace(chest.apex + 0.9 * depth, chest.dome[side] + 0.02, 14)
    u = np.maximum(chest.wall(y) - depth * np.linspace(1.25, 0.85, 14), 0.05)
    crown = np.array([[0.06, y[0] + 0.01], [0.6 * u[0] + 0.03, y[0] - 0.008]])
    edge = np.stack([chest.centre + s * np.concatenate([crown[:, 0], u]), np.concatenate([crown[:, 1], y])], 1)
    inner = np.concatenate([edge, [[chest.centre, y[-1] + 0.1], [chest.centre, y[0]]]])
    collapsed = plate.polygon(inner, 0.002)
    free = lung * (1 - collapsed.whole(lung.shape))
    plate.add(lung * collapsed, 0.36)
    plate.density += free * (np.float32(0.03) - plate.density)
    plate.dense(plate.lines([edge], 0.018, 0.002) * lung, 0.85)
    plate.mark("pneumothorax", free)


def bronchogram(plate: Plate, mask: Patch, centre: Points, hilum: Points) -> None:
    """Dark air-filled bronchi that fork on their way from the hilum through a dense patch."""
    way = centre - hilum
    way = way / (np.hypot(*way) + 1e-6)
    across = np.array([-way[1], way[0]])
    t = np.linspace(0, 1, 6)[:, None]
    trees = []
    for offset, turn in ((-0.035, -0.04), (0.03, 0.045)):
        stem = centre - 0.13 * way + offset * across + t * (0.26 * way) + turn * t**2 * across
        fork = stem[2] + t * (0.1 * way) - np.sign(turn) * 0.07 * t * across
        trees += [stem, fork]
    plate.add(plate.lines(trees, 0.010, 0.003) * mask, -0.17)


def rays(plate: Plate, x: float, y: float, n: int, near: float, far: float) -> list[Points]:
    """Straight rays around a point, of varying length."""
    angle = np.linspace(0, 2 * np.pi, n, endpoint=False) + plate.rng.uniform(-0.15, 0.15, n)
    tall = plate.width / plate.height
    reach = plate.rng.uniform(0.72, 1, n) * far
    return [
        np.array([[x + r * np.cos(a), y + tall * r * np.sin(a)] for r in (near, e)])
        for a, e in zip(angle, reach, strict=True)
    ]


def _plates(plate: Plate, chest: Chest, f: Finding, side: str) -> None:
    """Plate-like bands of collapse, nearly horizontal, above the raised diaphragm."""
    rng, s = plate.rng, SIGN[side]
    y = chest.dome[side] - 0.035 if f.zone == "lower" else chest.spot(side, "mid")[1]
    bands = []
    for n in range(2 + f.grade // 2):
        tilt, y0 = rng.uniform(-0.03, 0.05), y - 0.058 * n + rng.uniform(-0.006, 0.006)
        u = np.linspace(0.34, rng.uniform(0.9, 0.97), 6) * chest.half
        bands.append(np.stack([chest.centre + s * u, y0 + tilt * np.linspace(-1, 1, 6)], 1))
    plate.dense(plate.lines(bands, 0.026, 0.005) * plate.lung[side], 0.72)


def _rind(chest: Chest, side: str) -> Points:
    """A band of thickened pleura over the apex and down the lateral wall."""
    y = np.linspace(chest.apex - 0.004, chest.dome[side] + 0.03, 18)
    outer = chest.wall(y) + 0.003
    inner = np.maximum(outer - 0.055 - 0.012 * np.sin(30 * y), 0.02)
    y_in = y + 0.055 * np.exp(-((y - chest.apex) / 0.06))  # the apical cap
    out = np.stack([chest.centre + SIGN[side] * outer, y], 1)
    back = np.stack([chest.centre + SIGN[side] * inner, y_in], 1)[::-1]
    return np.concatenate([out, back])


def mesh(plate: Plate, grain: float, sharp: float) -> Image:
    """A net of thin lines: where a smooth random field crosses zero."""
    return np.exp(-np.square(plate.texture(grain) * np.float32(sharp)))


def _fibrosis(plate: Plate, chest: Chest, side: str, grade: int) -> None:
    """A coarse net at the bases and along the wall, fading upwards."""
    y = np.linspace(0, 1, plate.height, dtype=np.float32)[:, None]
    low = plate.lung[side] * np.clip((y - (chest.dome[side] - 0.26)) / 0.12, 0, 1)
    plate.dense(Patch(low * mesh(plate, 0.034, 3.2), 0, 0), 0.70 + 0.05 * grade)
    plate.add(Patch(low, 0, 0), 0.06)


def _interstitial(plate: Plate, chest: Chest, side: str, grade: int) -> None:
    """A fine net and many small nodules all over the lung."""
    y = plate.rng.uniform(chest.apex, chest.dome[side] + 0.07, 75)
    u = plate.rng.uniform(0.15, 1, 75) * chest.wall(y)
    dots = plate.circles(np.stack([chest.centre + SIGN[side] * u, y], 1), plate.rng.uniform(0.008, 0.014, 75), 0.002)
    plate.dense(plate.lung[side] * dots, 0.62 + 0.05 * grade)
    plate.add(Patch(plate.lung[side] * mesh(plate, 0.05, 4.0), 0, 0), 0.16 + 0.03 * grade)


def _cavity(plate: Plate, chest: Chest, side: str) -> None:
    """An apical ring with a thick wall, satellite nodules, and streaks drawn down to the hilum."""
    rng, s = plate.rng, SIGN[side]
    x, y = chest.spot(side, "upper", rng.uniform(0.56, 0.66), rng.uniform(-0.01, 0.02))
    hilum = np.array([chest.centre + s * 0.10, 0.42])
    start = np.array([x, y]) + rng.normal(0, 1, (6, 2)) * (0.035, 0.02)
    streaks = [np.stack([p, 0.5 * (p + hilum) + rng.normal(0, 0.012, 2), hilum]) for p in start]
    plate.dense(plate.lines(streaks, 0.009, 0.002) * plate.lung[side], 0.60)
    plate.dense(plate.blob(x, y, 0.11, 0.12, 0.02) * plate.lung[side], 0.44)
    plate.cover(plate.circles([(x, y)], [0.072], 0.003), 0.80)
    plate.cover(plate.circles([(x, y)], [0.044], 0.003), 0.06)
    around, far = rng.uniform(0, 2 * np.pi, 7), rng.uniform(0.095, 0.15, 7)
    satellites = np.stack([x + far * np.cos(around), y + 0.83 * far * np.sin(around)], 1)
    plate.dense(plate.circles(satellites, 0.014, 0.003) * plate.lung[side], 0.66)


def _edema(plate: Plate, chest: Chest, grade: int) -> None:
    """Bat-wing haze around both hila, and short Kerley B lines at the lateral bases."""
    lung = plate.lung["both"]
    for side in ("right", "left"):
        x = chest.centre + SIGN[side] * 0.155
        plate.dense(plate.ellipse(x, 0.45, 0.12, 0.185, SIGN[side] * -12, 0.035) * lung, 0.60 + 0.05 * grade)
        y = np.linspace(chest.dome[side] - 0.11, chest.dome[side] + 0.05, 8)
        far = chest.wall(y)
        lines = [
            np.array([[chest.centre + SIGN[side] * (u - d), v] for d in (0.002, 0.06)])
            for u, v in zip(far, y, strict=True)
        ]
        plate.dense(plate.lines(lines, 0.006, 0.001) * lung, 0.62)
    plate.add(Patch(lung, 0, 0), 0.03 * (1 + grade))


def _fracture(plate: Plate, chest: Chest, f: Finding, side: str) -> None:
    """Displaced ends and bright callus on neighbouring ribs, near the lateral wall."""
    first = {"upper": 2, "mid": 4, "lower": 6}[f.zone]
    step = np.array([0, 0.026])
    ends, calluses = [], []
    for n in range(first, first + 3):
        rib = chest.ribs(side, [n])[0]
        k = 7 if n % 2 else 6
        plate.cover(plate.lines([rib[k - 1 : k + 1]], 0.032, 0.002), 0.13)  # the gap
        ends += [rib[k:] + step, rib[k - 3 : k]]
        calluses += [rib[k - 1], rib[k] + step]
    plate.dense(plate.lines(ends, 0.028, 0.002), 0.64)
    plate.dense(plate.circles(np.array(calluses), 0.026, 0.005), 0.95)


def _device(plate: Plate, chest: Chest, variant: str) -> None:
    """Metal and plastic: what a device looks like depends on which it is."""
    c = chest.centre
    if variant == "pacemaker":
        x, y = c + 0.29, 0.235
        box = np.array(
            [
                [x - 0.06, y - 0.035],
                [x + 0.05, y - 0.04],
                [x + 0.07, y + 0.01],
                [x + 0.03, y + 0.05],
                [x - 0.055, y + 0.045],
            ]
        )
        leads = [
            curve([[x - 0.03, y - 0.04], [c + 0.12, 0.16], [c - 0.045, 0.27], [c - 0.05, 0.5], [c + e, 0.64]])
            for e in (-0.03, 0.12)
        ]
        plate.cover(plate.lines(leads, 0.011), 0.98)
        plate.cover(plate.polygon(box, 0.003), 1.0)
    elif variant == "central line":
        path = curve([[c - 0.2, 0.0], [c - 0.15, 0.1], [c - 0.06, 0.21], [c - 0.052, 0.36], [c - 0.05, 0.47]])
        plate.cover(plate.lines([path], 0.013), 0.95)
        port = plate.ellipse(c - 0.27, 0.27, 0.04, 0.045, soft=0.002)
        plate.cover(port, 0.95)
        plate.cover(plate.lines([curve([[c - 0.27, 0.25], [c - 0.22, 0.13], [c - 0.15, 0.1]])], 0.012), 0.95)
    elif variant == "endotracheal tube":
        for offset in (-0.013, 0.013):
            plate.cover(plate.lines([np.array([[c + offset, -0.02], [c + offset, 0.28]])], 0.008), 0.93)
        tube = curve([[c + 0.03, -0.02], [c + 0.03, 0.4], [c + 0.03, 0.62], [c + 0.09, 0.74], [c + 0.16, 0.78]])
        plate.cover(plate.lines([tube], 0.010), 0.93)
    else:
        for y in np.linspace(0.24, 0.58, 6):
            a = np.linspace(0, 2 * np.pi, 12)
            loop = np.stack([c + 0.028 * np.cos(a), y + 0.014 * np.sin(a)], 1)
            plate.cover(plate.lines([loop, np.array([[c + 0.02, y], [c + 0.04, y - 0.012]])], 0.009), 1.0)
