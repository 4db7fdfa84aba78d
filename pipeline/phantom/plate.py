"""The drawing surface: soft masks of lines, polygons and circles, and their effect on density.

Coordinates are fractions of the drawn image, x of its width and y of its height, origin at the top left. Lengths called
*radius*, *thickness* or *soft* are fractions of the width, so that circles stay round. Density runs from 0 (black: air
outside the body) to 1 (white: metal).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.float32]
Mask = npt.NDArray[np.uint8]
Points = npt.NDArray[np.float64]
_SHIFT = 4  # fractional bits of OpenCV's fixed-point coordinates


class Patch:
    """A mask, float32 in 0..1, stored only where not zero: ``values`` [h, w] start at row ``top``, column ``left``.

    Multiplying by a whole image or by another patch gives a patch.
    """

    __array_ufunc__ = None  # an image times a patch comes here too

    def __init__(self, values: Image, top: int, left: int) -> None:
        self.values, self.top, self.left = values, top, left

    def of(self, image: Image) -> Image:
        """The part (a view) of a whole image that this patch covers."""
        return image[self.top : self.top + self.values.shape[0], self.left : self.left + self.values.shape[1]]

    def __mul__(self, other: Image | Patch) -> Patch:
        if isinstance(other, Patch):
            top, left = max(self.top, other.top), max(self.left, other.left)
            mine = self.values[top - self.top :, left - self.left :]
            its = other.values[top - other.top :, left - other.left :]
            h, w = min(len(mine), len(its)), min(mine.shape[1], its.shape[1])
            return Patch(mine[:h, :w] * its[:h, :w], top, left)
        return Patch(self.values * self.of(other), self.top, self.left)

    __rmul__ = __mul__

    def whole(self, shape: tuple[int, ...]) -> Image:
        """The mask as a whole image."""
        image = np.zeros(shape, np.float32)
        self.of(image)[:] = self.values
        return image


class Plate:
    """An image being drawn: the density so far, the masks that later layers need, and the drawing tools.

    ``density`` float32 [H, W]; ``lung`` maps a side (or "both") to a float32 mask; ``marked`` collects uint8 masks of
    findings whose archive publishes boxes or outlines.
    """

    def __init__(self, width: int, height: int, rng: np.random.Generator) -> None:
        self.width, self.height, self.rng = width, height, rng
        self.density: Image = np.full((height, width), 0.03, np.float32)
        self.lung: dict[str, Image] = {}
        self.marked: dict[str, list[Mask]] = {}
        self._scale = np.array([width, height], float) * (1 << _SHIFT)

    def _fixed(self, points: npt.ArrayLike) -> npt.NDArray[np.int32]:
        return np.round(np.asarray(points, float) * self._scale).astype(np.int32)

    def _patch(
        self, corners: npt.NDArray[np.int32], margin: float, soft: float, draw: Callable[[Mask], object]
    ) -> Patch:
        """Draw on a whole mask, then soften only the rectangle around the corners (fixed point) plus a margin."""
        mask = np.zeros((self.height, self.width), np.uint8)
        draw(mask)
        sigma = soft * self.width
        grow = int(margin * self.width + 3 * sigma) + 2
        flat = corners.reshape(-1, 2) >> _SHIFT
        left, top = np.clip(flat.min(0) - grow, 0, (self.width - 1, self.height - 1))
        right, bottom = np.clip(flat.max(0) + grow + 1, (left + 1, top + 1), (self.width, self.height))
        part = mask[top:bottom, left:right]
        if sigma > 0.8:  # two box filters: near enough to a Gaussian and much faster
            k = max(3, round(np.sqrt(6 * sigma * sigma + 1)) | 1)
            part = cv2.blur(cv2.blur(part, (k, k)), (k, k))
        elif sigma > 0.3:
            part = cv2.GaussianBlur(part, (3, 3), sigma)
        return Patch(part.astype(np.float32) * np.float32(1 / 255), int(top), int(left))

    def polygon(self, points: npt.ArrayLike, soft: float = 0.0) -> Patch:
        """Mask of a filled polygon [n, 2], its edge softened by ``soft`` (sigma, fraction of the width)."""
        at = self._fixed(points)
        return self._patch(at, 0, soft, lambda m: cv2.fillPoly(m, [at], 255, cv2.LINE_AA, _SHIFT))

    def lines(self, courses: Points | Sequence[Points], thickness: float, soft: float = 0.0) -> Patch:
        """Mask of polylines of one thickness (fraction of the width): an array [n, k, 2] or a list of [k, 2]."""
        each = list(self._fixed(courses)) if isinstance(courses, np.ndarray) else [self._fixed(c) for c in courses]
        wide = max(1, round(thickness * self.width))
        at = np.concatenate(each)
        return self._patch(at, thickness, soft, lambda m: cv2.polylines(m, each, False, 255, wide, cv2.LINE_AA, _SHIFT))

    def circles(self, centres: npt.ArrayLike, radii: npt.ArrayLike, soft: float = 0.0) -> Patch:
        """Mask of filled circles at [n, 2] with radii [n] (fractions of the width)."""
        at = self._fixed(centres)
        r = np.round(np.broadcast_to(np.asarray(radii, float), len(at)) * self._scale[0]).astype(int)

        def draw(mask: Mask) -> None:
            for centre, radius in zip(at.tolist(), r.tolist(), strict=True):
                cv2.circle(mask, centre, radius, 255, -1, cv2.LINE_AA, _SHIFT)

        return self._patch(at, float(r.max()) / self._scale[0], soft, draw)

    def ellipse(self, x: float, y: float, rx: float, ry: float, angle: float = 0.0, soft: float = 0.0) -> Patch:
        """Mask of a filled ellipse; both radii are fractions of the width, the angle in degrees."""
        at = self._fixed((x, y))
        axes = (round(rx * self._scale[0]), round(ry * self._scale[0]))

        def draw(mask: Mask) -> None:
            cv2.ellipse(mask, at.tolist(), axes, angle, 0, 360, 255, -1, cv2.LINE_AA, _SHIFT)

        return self._patch(at, max(rx, ry), soft, draw)

    def blob(self, x: float, y: float, r: float, rough: float = 0.2, soft: float = 0.02, tall: float = 1.0) -> Patch:
        """Mask of an irregular rounded patch of mean radius r, its outline wobbling by the share ``rough``."""
        angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
        wobble = sum(self.rng.uniform(-1, 1) / k * np.sin(k * angle + self.rng.uniform(0, 6.3)) for k in (2, 3, 4, 5))
        radius = r * (1 + rough * np.asarray(wobble))
        aspect = tall * self.width / self.height
        return self.polygon(np.stack([x + radius * np.cos(angle), y + aspect * radius * np.sin(angle)], 1), soft)

    def texture(self, grain: float) -> Image:
        """Smooth random field of about zero mean and unit deviation with features of size ``grain``."""
        shape = (max(2, round(self.height / self.width / grain)), max(2, round(1 / grain)))
        coarse = self.rng.standard_normal(shape, dtype=np.float32)
        return cv2.resize(coarse, (self.width, self.height), interpolation=cv2.INTER_CUBIC)

    def mark(self, kind: str, mask: Image) -> None:
        """Remember where a finding was drawn."""
        self.marked.setdefault(kind, []).append((mask * 255).astype(np.uint8))

    def add(self, mask: Patch, amount: float) -> None:
        """Add density where the mask is."""
        part = mask.of(self.density)
        part += mask.values * np.float32(amount)

    def cover(self, mask: Patch, level: float) -> None:
        """Blend towards one density where the mask is."""
        part = mask.of(self.density)
        part += mask.values * (np.float32(level) - part)

    def dense(self, mask: Patch, level: float) -> None:
        """Blend towards a density where the mask is, without ever making the image darker."""
        part = mask.of(self.density)
        part += mask.values * np.maximum(np.float32(level) - part, 0)


def rounded(corners: Points) -> Points:
    """A smooth closed curve near the given corners (two rounds of corner cutting)."""
    for _ in range(2):
        after = np.roll(corners, -1, 0)
        corners = np.stack([0.75 * corners + 0.25 * after, 0.25 * corners + 0.75 * after], 1).reshape(-1, 2)
    return corners


def curve(corners: list[list[float]]) -> Points:
    """A smooth open curve through the neighbourhood of the given points."""
    points = np.array(corners, float)
    for _ in range(2):
        cut = np.stack([0.75 * points[:-1] + 0.25 * points[1:], 0.25 * points[:-1] + 0.75 * points[1:]], 1)
        points = np.concatenate([points[:1], cut.reshape(-1, 2), points[-1:]])
    return points


def boxes(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Bounding box x, y, width, height in pixels of what a uint8 mask marks above half."""
    x, y, w, h = cv2.boundingRect((mask > 127).astype(np.uint8))
    return float(x), float(y), float(w), float(h)
