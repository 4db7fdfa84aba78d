"""How each finding is painted on a lateral view."""

from __future__ import annotations

import numpy as np

from pipeline.phantom.findings import Finding
from pipeline.phantom.frontal import bronchogram, mesh, rays
from pipeline.phantom.lateral import Profile
from pipeline.phantom.plate import Patch, Plate, curve


def paint(f: Finding, plate: Plate, chest: Profile) -> None:
    """Paint a finding where a lateral view would show it; sides fall on top of each other here."""
    rng, g, lung = plate.rng, f.grade, plate.lung["both"]
    x, y = chest.spot(f.zone or "mid", float(rng.uniform(0.55, 0.8)))
    match f.kind:
        case "pleural effusion":
            level = chest.dome + (0.09, 0.02, -0.12)[g]
            t = np.linspace(0.18, 0.85, 14)  # the level climbs at both ends and drowns the diaphragm behind
            top = level - 0.09 * np.clip((t - 0.62) / 0.22, 0, 1) ** 3 - 0.03 * np.clip((0.35 - t) / 0.15, 0, 1) ** 2
            pool = np.concatenate([np.stack([t, top], 1), [[0.85, 1.0], [0.18, 1.0]]])
            plate.dense(plate.polygon(pool, 0.006) * lung, 0.70)
        case "pneumothorax":
            t = np.linspace(0, 1, 10)
            line = np.stack([0.3 + 0.46 * t, chest.patient.apex + 0.12 + 0.05 * g + 0.05 * np.cos(5 * t)], 1)
            above = np.concatenate([line, [[0.85, 0.05], [0.25, 0.05]]])
            plate.cover(plate.polygon(above, 0.002) * lung, 0.10)
            plate.dense(plate.lines([line], 0.008, 0.001) * lung, 0.60)
        case "consolidation":
            mask = plate.blob(x, y, 0.14, 0.16, 0.012) * lung
            plate.dense(mask, 0.72)
            bronchogram(plate, mask, np.array([x, y]), np.array([0.53, 0.42]))
        case "pneumonia":
            mask = plate.blob(x, y, 0.16, 0.18, 0.035) * lung
            plate.dense(mask * np.clip(0.55 + 0.5 * plate.texture(0.075), 0, 1.1), 0.70)
        case "edema":
            plate.dense(plate.ellipse(0.53, 0.45, 0.2, 0.2, soft=0.05) * lung, 0.56 + 0.05 * g)
            plate.add(Patch(lung, 0, 0), 0.03 * (1 + g))
        case "atelectasis":
            bands = [
                np.array([[0.3, y - 0.05 * n + 0.02], [0.55, y - 0.05 * n], [0.8, y - 0.05 * n + 0.03]])
                for n in range(2)
            ]
            plate.dense(plate.lines(bands, 0.024, 0.003) * lung, 0.72)
        case "nodule":
            plate.cover(plate.circles([(x, y)], [0.05], 0.003), 0.74)
        case "mass":
            plate.cover(plate.blob(x, y, 0.1, 0.08, 0.005), 0.75)
        case "lung tumor":
            plate.dense(plate.lines(rays(plate, x, y, 14, 0.05, 0.15), 0.009, 0.002) * lung, 0.68)
            plate.cover(plate.blob(x, y, 0.075, 0.22, 0.003), 0.78)
        case "lung opacity":
            plate.dense(plate.ellipse(x, y, 0.13, 0.14, soft=0.035) * lung, 0.52)
        case "infiltration":
            mask = plate.blob(x, y, 0.19, 0.15, 0.03) * lung
            plate.dense(mask * np.clip(0.25 + 0.7 * plate.texture(0.035), 0, 1), 0.70)
        case "pleural thickening":
            edge = np.array(
                [
                    [0.6, chest.patient.apex + 0.01],
                    [0.72, chest.patient.apex + 0.07],
                    [0.8, 0.32],
                    [0.835, 0.5],
                    [0.84, 0.66],
                ]
            )
            plate.dense(plate.lines([edge], 0.055, 0.004), 0.78)
        case "pulmonary fibrosis":
            rows = np.linspace(0, 1, plate.height, dtype=np.float32)[:, None]
            low = np.clip((rows - (chest.dome - 0.22)) / 0.12, 0, 1)
            plate.dense(Patch(lung * low * mesh(plate, 0.034, 3.2), 0, 0), 0.72 + 0.05 * g)
        case "ild":
            spots = np.stack([rng.uniform(0.22, 0.82, 110), rng.uniform(chest.patient.apex, chest.dome + 0.1, 110)], 1)
            plate.dense(plate.circles(spots, rng.uniform(0.008, 0.014, 110), 0.002) * lung, 0.62 + 0.05 * g)
            plate.add(Patch(lung * mesh(plate, 0.05, 4.0), 0, 0), 0.14 + 0.03 * g)
        case "tuberculosis":
            plate.dense(plate.blob(x, y, 0.1, 0.12, 0.02) * lung, 0.46)
            plate.cover(plate.circles([(x, y)], [0.07], 0.003), 0.80)
            plate.cover(plate.circles([(x, y)], [0.043], 0.003), 0.08)
        case "calcification":
            spots = np.array([x, y]) + rng.normal(0, 1, (12, 2)) * (0.05, 0.042)
            plate.cover(plate.circles(spots, rng.uniform(0.013, 0.022, 12), 0.0015), 1.05)
        case "hiatal hernia":
            r, yc = 0.085 + 0.015 * g, chest.dome - 0.045
            plate.cover(plate.circles([(0.6, yc)], [r], 0.003), 0.80)
            gas = plate.circles([(0.6, yc)], [r * 0.84], 0.002)
            gas.values[max(round(yc * plate.height) - gas.top, 0) :] = 0
            plate.cover(gas, 0.25)
        case "rib fracture":
            y0 = {"upper": 0.3, "mid": 0.45, "lower": 0.6}[f.zone]
            calluses = [(0.72, y0), (0.73, y0 + 0.06), (0.71, y0 + 0.12)]
            plate.dense(plate.circles(calluses, 0.027, 0.004), 0.95)
        case "support devices":
            _device(plate, f.variant)


def _device(plate: Plate, variant: str) -> None:
    if variant == "pacemaker":
        plate.cover(plate.ellipse(0.2, 0.24, 0.022, 0.07, 12, 0.002), 1.0)
        leads = [curve([[0.22, 0.2], [0.4, 0.2], [0.46, 0.4], [0.42, 0.56], [e, 0.63]]) for e in (0.3, 0.4)]
        plate.cover(plate.lines(leads, 0.011), 0.98)
    elif variant == "central line":
        plate.cover(plate.lines([curve([[0.44, 0], [0.42, 0.15], [0.44, 0.3], [0.43, 0.46]])], 0.012), 0.95)
        plate.cover(plate.ellipse(0.19, 0.27, 0.02, 0.045, 12, 0.002), 0.95)
    elif variant == "endotracheal tube":
        plate.cover(plate.lines([np.array([[0.5, -0.02], [0.525, 0.27]])], 0.020), 0.88)
        plate.cover(plate.lines([curve([[0.56, -0.02], [0.6, 0.4], [0.58, 0.68], [0.45, 0.8]])], 0.010), 0.93)
    else:
        for t in np.linspace(0, 1, 6):
            px, py = 0.26 - 0.08 * t, 0.24 + 0.34 * t
            plate.cover(plate.lines([np.array([[px - 0.03, py], [px + 0.03, py - 0.01]])], 0.010), 1.0)
