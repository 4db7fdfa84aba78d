"""From a patient and findings to a finished picture, and the contact sheet that shows them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from pipeline.phantom import anatomy, frontal, lateral, profile
from pipeline.phantom.anatomy import Chest, Patient
from pipeline.phantom.findings import Finding, reshape_frontal, reshape_lateral
from pipeline.phantom.lateral import Profile
from pipeline.phantom.plate import Image, Mask, Plate

ASPECT = 1.2  # height over width of the field that is drawn


@dataclass(frozen=True)
class DrawnPicture:
    """``image`` float32 [H, W] in 0..1, 1 = dense; ``marked`` uint8 masks [H, W] of pneumonia and pneumothorax."""

    image: Image
    marked: dict[str, list[Mask]]


def render_picture(
    patient: Patient, findings: Sequence[Finding], position: str, size: int, seed: int, aspect: float = ASPECT
) -> DrawnPicture:
    """Draw one view.

    ``position`` is PA, AP or LATERAL; ``size`` the width in pixels and ``aspect`` height over width. ``seed`` decides
    what differs between views of one study: how the patient stands, exposure and noise. Raises ``ValueError`` for
    another position.

    The field drawn is always 5:6; a squarer film cuts it off above and below.
    """
    rng = np.random.default_rng(seed)
    plate = Plate(size, round(size * ASPECT), rng)
    if position == "LATERAL":
        _lateral(plate, patient, findings)
    elif position in ("PA", "AP"):
        _frontal(plate, patient, findings, position)
    else:
        raise ValueError(f"phantom view {position!r} is none of PA, AP, LATERAL")
    return _expose(plate, position, rng, round(size * aspect))


def _frontal(plate: Plate, patient: Patient, findings: Sequence[Finding], position: str) -> None:
    chest = Chest.of(patient, position)
    for f in findings:
        reshape_frontal(f, chest)
    anatomy.draw_lungs(plate, chest)
    for layer, step in (
        (frontal.paint_lung, anatomy.draw_mediastinum),
        (frontal.paint_heart, anatomy.draw_bones),
        (frontal.paint_top, None),
    ):
        for f in findings:
            plate.rng = np.random.default_rng(f.seed)
            layer(f, plate, chest)
        if step is not None:
            step(plate, chest)


def _lateral(plate: Plate, patient: Patient, findings: Sequence[Finding]) -> None:
    chest = Profile.of(patient)
    for f in findings:
        reshape_lateral(f, chest)
    lateral.draw_lungs(plate, chest)
    lateral.draw_mediastinum(plate, chest)
    lateral.draw_bones(plate, chest)
    for f in findings:
        plate.rng = np.random.default_rng(f.seed)
        profile.paint(f, plate, chest)


def _expose(plate: Plate, position: str, rng: np.random.Generator, rows: int) -> DrawnPicture:
    """Stand the patient a little askew, expose with quantum noise, and burn in the markers."""
    w, h = plate.width, plate.height
    pose = cv2.getRotationMatrix2D((w / 2, h / 2), rng.uniform(-2.5, 2.5), rng.uniform(0.96, 1.03))
    pose[:, 2] += rng.uniform(-0.015, 0.015, 2) * w
    pose[1, 2] -= 0.35 * (h - rows)

    def warp(a: np.ndarray) -> np.ndarray:
        return cv2.warpAffine(a, pose, (w, rows), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    image = np.clip(warp(plate.density), 0, 1)
    bow = np.float32(rng.uniform(-0.18, 0.22))  # the film's curve, brighter or darker in the middle greys
    image += bow * image * (1 - image)
    image = image * np.float32(rng.uniform(0.92, 1.04)) + np.float32(rng.uniform(0, 0.03))
    # Few quanta pass through dense tissue, so the noise grows with density. The mean of four bytes is near enough to
    # normal; its deviation is 37.
    quanta = np.frombuffer(rng.bytes(image.size), np.uint8).reshape(image.shape)
    noise = cv2.blur(quanta, (2, 2)).astype(np.float32) - np.float32(127.5)
    image += noise * (0.6 + image) * np.float32(rng.uniform(0.006, 0.018) / 37)
    text = np.zeros(image.shape, np.uint8)
    _stamp(text, "PHANTOM", 0.03, 0.975)
    _stamp(text, "L", 0.04 if position == "LATERAL" else 0.91, 0.07, 1.6)
    if position == "AP":
        _stamp(text, "PORTABLE", 0.03, 0.04)
    image += text.astype(np.float32) * np.float32(1 / 255) * (np.float32(0.95) - image)
    marked = {kind: [warp(m) for m in masks] for kind, masks in plate.marked.items()}
    return DrawnPicture(np.clip(image, 0, 1), marked)


def write_picture(path: Path, image: Image, options: Sequence[int] = ()) -> None:
    """Write a picture (float [H, W] in [0, 1]) as 8-bit PNG or JPEG, by the ending of its name.

    Args:
        options: OpenCV's, of the encoder.

    Raises:
        OSError: it cannot be written, where ``cv2.imwrite`` leaves half a file and says nothing.
    """
    path.write_bytes(cv2.imencode(path.suffix, np.round(image * 255).astype(np.uint8), options)[1].tobytes())


def _stamp(text: Mask, word: str, x: float, y: float, big: float = 1.0) -> None:
    h, w = text.shape
    thick = max(1, round(big * w / 400))
    at = (round(x * w), round(y * h))
    cv2.putText(text, word, at, cv2.FONT_HERSHEY_SIMPLEX, big * w / 700, 255, thick, cv2.LINE_AA)
