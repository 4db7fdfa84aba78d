"""From a DICOM's stored values to 8-bit grey: modality transform, values of interest, inversion, min-max (PS3.3 C.11).

Up to 16 bits all steps are one table over the stored values: the picture itself stays integer. MONOCHROME1, where low
values are bright, is inverted here and nowhere else.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.storage.pictures import Grey, ImageError, blocks, resize, target_size, to_8_bit

Values = NDArray[Any]

MAX_ELEMENT = 1 << 20  # bytes; 65,536 entries of 16 bits take 131,072
LUMA = np.array([[0.299, 0.587, 0.114]], np.float32)  # ITU-R BT.601, as in PS3.3 C.7.6.3.1.2


def display(
    values: Values, bits: int, signed: bool, header: Any, facts: dict[str, Any], little: bool, short_side: int
) -> Grey:
    """Stored values -> uint8 [H, W], reduced if ``short_side`` is above 0."""
    interpretation = facts["interpretation"]
    if not interpretation.startswith("MONOCHROME"):
        # YBR as the file or the JPEG inside stores it begins with the luma; J2K's YBR_ICT and YBR_RCT come as RGB.
        if values.ndim == 3 and interpretation in ("YBR_FULL", "YBR_FULL_422"):
            values = np.ascontiguousarray(values[:, :, 0])
        if values.ndim == 3:
            return _reduced(to_8_bit(_luma(values)), short_side)
        return _through_table(values, [], False, None, short_side)
    modality = _modality(header, signed, little, facts["mended"])
    chosen = _values_of_interest(header, signed, little, modality, facts["mended"])
    negative = interpretation == "MONOCHROME1"
    padding = _padding(header, facts, bits, signed)
    draw = _through_table if values.dtype.itemsize <= 2 else _by_pixel
    for step in chosen:
        try:
            return draw(values, [*modality, step], negative, padding, short_side)
        except ImageError:
            if values.min() == values.max():
                raise
        what = "VOI LUT" if "entries" in step else "window"
        facts["mended"].append(f"DICOM {what} misses the picture's values; the window, or else all values, are shown")
    return draw(values, modality, negative, padding, short_side)


def _by_pixel(
    values: Values, steps: list[dict[str, Any]], negative: bool, padding: tuple[int, int] | None, short_side: int
) -> Grey:
    """As ``_through_table``, of values of more than 16 bits."""
    shown = np.empty(values.shape, np.float64)
    for rows in blocks(values):
        part = _chain(values[rows].astype(np.float64), steps)
        shown[rows] = -part if negative else part
    present = None if padding is None else (values < padding[0]) | (values > padding[1])
    return _reduced(to_8_bit(shown, present), short_side)


def _luma(values: Values) -> NDArray[np.float32]:
    """RGB [H, W, 3] -> luma float32 [H, W], some rows at a time: a float copy of the colours would be large."""
    luma = np.empty(values.shape[:2], np.float32)
    for rows in blocks(values):
        luma[rows] = cv2.transform(np.ascontiguousarray(values[rows], np.float32), LUMA)
    return luma


def _reduced(image: Grey, short_side: int) -> Grey:
    if image.min() == image.max():
        raise ImageError("image is constant")
    return resize(image, short_side) if short_side > 0 else image


def _through_table(
    values: Values, steps: list[dict[str, Any]], negative: bool, padding: tuple[int, int] | None, short_side: int
) -> Grey:
    """(u)int8 or (u)int16 [H, W] -> uint8 through one table over the stored values from the lowest to the highest."""
    low, high = int(values.min()), int(values.max())
    if low == high:
        raise ImageError("image is constant")
    stored = np.arange(low, high + 1)
    shown = _chain(stored.astype(np.float64), steps)
    if negative:
        shown = -shown
    change = np.diff(shown)
    one_way = bool((change >= 0).all() or (change <= 0).all())
    padded = padding is not None and padding[0] <= high and padding[1] >= low
    if 0 < short_side < min(values.shape) and one_way and not padded:
        ramp = _ramp(shown)
        if ramp is not None:
            return _along(values, low, ramp, ramp[0] > 0 or ramp[1] < high - low, short_side)
    present = np.ones(len(stored), bool)
    codes = stored & (0xFF if values.dtype.itemsize == 1 else 0xFFFF)  # the words as they are in memory
    words = values.view(np.uint8 if values.dtype.itemsize == 1 else np.uint16)
    if padded or not one_way:  # else the extremes show at the ends of the table
        counts = cv2.calcHist([words], [0], None, [int(codes.max()) + 1], [0, int(codes.max()) + 1])
        present = counts.ravel()[codes] > 0
        if padded and padding is not None:
            present &= (stored < padding[0]) | (stored > padding[1])
    table = np.zeros(256 if words.dtype.itemsize == 1 else 65536, np.uint8)
    table[codes] = to_8_bit(shown, present)
    image = cv2.LUT(words, table) if words.dtype.itemsize == 1 else table[words]
    return _reduced(np.asarray(image, dtype=np.uint8), short_side)


def _ramp(shown: NDArray[np.float64]) -> tuple[int, int, float, float] | None:
    """First and last index of a table's ramp and the grey levels at these, if the order of steps may be turned round.

    Outside the ramp the table is constant, so that stored values can be clipped to it. Where it is a straight line but
    for ``bend`` grey levels, the line of the mean is the mean of the lines: averaging stored values and then following
    the line is off by ``bend`` and the rounding of the result (0.5). The usual order rounds each pixel (0.5) and each
    mean (0.5). In sum less than 2, so whole levels differ by at most 1.
    """
    moved = np.flatnonzero(shown != shown[0])
    if not len(moved) or not np.isfinite(shown[[0, -1]]).all():
        return None
    first, last = int(moved[0]) - 1, int(np.flatnonzero(shown != shown[-1])[-1]) + 1
    level = 255 / float(abs(shown[-1] - shown[0]))
    ends = (0.0, 255.0) if shown[-1] > shown[0] else (255.0, 0.0)
    bend = np.abs(shown[first : last + 1] - np.linspace(shown[0], shown[-1], last + 1 - first)).max() * level
    return (first, last, *ends) if bend < 0.45 else None


def _along(values: Values, low: int, ramp: tuple[int, int, float, float], clipped: bool, short_side: int) -> Grey:
    """Stored values averaged over areas, then along the ramp: uint8, at most one level from the usual order.

    Rows are averaged here and columns by OpenCV, whose own averaging of both is slower; a few rows at a time stay in
    the processor's cache.
    """
    first, last, start, stop = ramp
    height, width = values.shape
    columns, rows = target_size(height, width, short_side)
    edges = np.arange(rows + 1) * (height / rows)
    tops, bottoms = np.floor(edges[:-1]).astype(int), np.minimum(np.ceil(edges[1:] - 1e-9).astype(int), height)
    lines = tops[:, None] + np.arange((bottoms - tops).max())
    shares = np.minimum(lines + 1, edges[1:, None]) - np.maximum(lines, edges[:-1, None])  # of each row that is covered
    shares = (shares * (rows / height)).astype(np.float32)
    means = np.empty((rows, width), np.float32)
    block = np.empty((lines.shape[1], width), np.float32)
    lowest, highest = np.float32(low + first), np.float32(low + last)
    for row, (top, bottom) in enumerate(zip(tops.tolist(), bottoms.tolist(), strict=True)):
        part = block[: bottom - top]
        np.copyto(part, values[top:bottom])
        if clipped:
            part.clip(lowest, highest, out=part)
        np.einsum("r,rc->c", shares[row, : bottom - top], part, out=means[row])
    small = cv2.resize(means, (columns, rows), interpolation=cv2.INTER_AREA)
    levels = start + (small - (low + first)) * ((stop - start) / (last - first))
    return np.asarray(np.rint(levels).clip(0, 255), dtype=np.uint8)


def _padding(header: Any, facts: dict[str, Any], bits: int, signed: bool) -> tuple[int, int] | None:
    """Lowest and highest stored value that is padding (PS3.3 C.7.5.1.1.2), or None."""
    try:
        ends = [
            _whole(header[name].value) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit") if name in header
        ]
    except Exception as error:
        raise ImageError(f"DICOM pixel padding is damaged ({type(error).__name__})") from None
    if not ends or "PixelPaddingValue" not in header or not bits:
        return None
    if None in ends:
        return None
    width = facts["allocated"]
    known = [int(end) for end in ends if end is not None]
    # Some writers state a signed value as the unsigned word, or the other way round.
    known = [end - (1 << width) if signed and end >= 1 << (width - 1) else end for end in known]
    known = [end + (1 << width) if not signed and end < 0 else end for end in known]
    return min(known), max(known)


def _whole(value: Any) -> int | None:
    """An integer element, which in an implicit data set may come as bytes; None if empty."""
    if isinstance(value, bytes):
        return int.from_bytes(value[:2], "little") if value else None
    return None if value is None or value == "" else int(value)


def _modality(header: Any, signed: bool, little: bool, mended: list[str]) -> list[dict[str, Any]]:
    """The modality transform as plain numbers, checked (PS3.3 C.11.1): without it the values mean something else."""
    table = first_item(header, "ModalityLUTSequence")
    if table is not None:
        return [_table(table, signed, little, "modality")]
    slope, intercept = number(header, "RescaleSlope", mended), number(header, "RescaleIntercept", mended)
    if slope == 0:
        raise ImageError("DICOM RescaleSlope is 0")
    return [{"slope": 1.0 if slope is None else slope, "intercept": intercept or 0.0}]


def _values_of_interest(
    header: Any, signed: bool, little: bool, modality: list[dict[str, Any]], mended: list[str]
) -> list[dict[str, Any]]:
    """The first VOI LUT and the first window, of which the first that shows something is used (PS3.3 C.11.2). They
    choose among the values, as a viewer may: what is wrong with one does not cost the picture, but is ``mended``."""
    step = modality[0]
    # A table's output is unsigned.
    negative = "slope" in step and (signed or step["intercept"] < 0 or step["slope"] < 0)
    found: list[dict[str, Any]] = []
    try:
        table = first_item(header, "VOILUTSequence")
        if table is not None:
            found.append(_table(table, negative, little, "VOI"))
    except ImageError:
        mended.append("DICOM VOI LUT is damaged; the window, or else all values, are shown")
    try:
        centre, width = number(header, "WindowCenter", mended), number(header, "WindowWidth", mended)
        if centre is None or width is None:
            return found
        function = str(header.get("VOILUTFunction") or "LINEAR").strip().upper()
        if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
            raise ImageError("function")
        if width <= 0 or (function == "LINEAR" and width < 1):
            raise ImageError("width")
        return [*found, {"function": function, "centre": centre, "width": width}]
    except Exception:  # pydicom may raise anything where an element is asked for
        if not found:
            mended.append("DICOM window is damaged or empty; all values are shown")
        return found


def raw_size(header: Any, tag: Any) -> int:
    """Bytes of an element that pydicom has made no objects of yet; 0 of others."""
    element = header.get_item(tag, keep_deferred=True)  # else one of which pydicom knows nothing is made an object
    return len(element.value or b"") if element is not None and element.is_raw else 0


def first_item(header: Any, keyword: str) -> Any:
    """The first item of a sequence, or None.

    Raises:
        ImageError: it is damaged, or an element of it is larger than the largest table: objects cost more than bytes.
    """
    try:
        items = header.get(keyword)
        item = items[0] if items else None
        if item is not None and any(raw_size(item, tag) > MAX_ELEMENT for tag in item.keys()):  # noqa: SIM118
            raise ValueError
        return item
    except Exception as error:
        raise ImageError(f"DICOM look-up table is damaged ({type(error).__name__})") from None


def number(header: Any, keyword: str, mended: list[str]) -> float | None:
    """The first value of a decimal element, or None where there is none; a comma in it is a decimal point, as PS3.5 6.2
    allows no other meaning."""
    try:
        try:
            value = header.get(keyword)
        except Exception:
            raw = header.get_item(keyword)
            value = (raw.value or b"").decode("ascii").split("\\")[0].strip("\0 ") if raw is not None else None
        if value is not None and not isinstance(value, str | bytes) and hasattr(value, "__len__"):
            value = value[0] if len(value) else None
        if isinstance(value, str) and value.count(",") == 1 and "." not in value:
            value = value.replace(",", ".")
            mended.append("DICOM decimal comma; read as a point")
        found = None if value is None or value == "" else float(value)
    except Exception as error:
        raise ImageError(f"DICOM {keyword} is damaged ({type(error).__name__})") from None
    if found is not None and not np.isfinite(found):
        raise ImageError(f"DICOM {keyword} is not finite")
    return found


def _table(item: Any, signed: bool, little: bool, name: str) -> dict[str, Any]:
    """A look-up table (PS3.3 C.11.1.1, C.11.2.1.1): entries and the value that maps to the first.

    The descriptor states entries, first value mapped and bits; entries of 8 bits may be packed two to a word.
    """
    order = "<" if little else ">"
    try:
        words = _words(item["LUTDescriptor"].value, order)
        count, first, bits = int(words[0]), int(words[1]), int(words[2])
        count = count or 65536
        if signed and first > 0x7FFF:
            first -= 0x10000
        raw = item["LUTData"].value
        if isinstance(raw, bytes) and bits <= 8 and count <= len(raw) <= count + 1:
            entries = np.frombuffer(raw, np.uint8)
        else:
            entries = _words(raw, order)
            if bits <= 8 and len(entries) == (count + 1) // 2 and count > 1:
                entries = entries.astype("<u2").view(np.uint8)
        if len(entries) < count or not 1 <= bits <= 16:
            raise ValueError
        return {"first": first, "entries": entries[:count].astype(np.float64)}
    except Exception as error:
        raise ImageError(f"DICOM {name} look-up table is damaged ({type(error).__name__})") from None


def _words(value: Any, order: str) -> Values:
    """Unsigned 16-bit words of an element that is a list or, of an unclear representation, bytes."""
    if isinstance(value, bytes):
        return np.frombuffer(value[: len(value) // 2 * 2], f"{order}u2").astype(np.int64) & 0xFFFF
    words = np.atleast_1d(np.asarray(value, np.int64))
    return np.concatenate([words[:1] & 0xFFFF, words[1:2], words[2:] & 0xFFFF])


def _chain(values: NDArray[np.float64], steps: list[dict[str, Any]]) -> NDArray[np.float64]:
    """Apply the transforms to float64 values of any shape; a window's output is 0..1, as min-max follows anyway."""
    for step in steps:
        if "slope" in step:
            values = values * step["slope"] + step["intercept"]
        elif "entries" in step:
            with np.errstate(invalid="ignore"):
                index = np.nan_to_num(np.rint(values - step["first"])).clip(0, len(step["entries"]) - 1)
            values = step["entries"][index.astype(np.int64)]
        else:
            values = _window(values, step["function"], step["centre"], step["width"])
    return values


def _window(values: NDArray[np.float64], function: str, centre: float, width: float) -> NDArray[np.float64]:
    """PS3.3 C.11.2.1.2.1 (LINEAR), C.11.2.1.3.2 (LINEAR_EXACT), C.11.2.1.3.1 (SIGMOID), to 0..1."""
    if function == "SIGMOID":
        with np.errstate(over="ignore"):  # beyond exp's range the quotient is 0, as it should be
            return 1 / (1 + np.exp(-4 * (values - centre) / width))
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0, 1)
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)
