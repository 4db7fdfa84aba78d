"""DICOM files as the archives publish them: JPEG baseline, JPEG 2000 and plain explicit little endian."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from pipeline.phantom.plate import Image

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_DIGITAL_XRAY = "1.2.840.10008.5.1.4.1.1.1.1"
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


def uid(rng: np.random.Generator) -> str:
    """A UID under the UUID root 2.25, from the generator rather than from clock and host."""
    return f"2.25.{int(rng.integers(10**17, 10**18))}{int(rng.integers(10**17, 10**18))}"


def write_jpeg(
    path: Path, image: Image, name: str, patient: str, sex: str, age: int, view: str, inverted: bool = False
) -> None:
    """Write an 8-bit JPEG-baseline secondary capture (RSNA, SIIM): ``image`` float32 [H, W] in 0..1."""
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit

    grey = np.round(image * 255).astype(np.uint8)
    data = cv2.imencode(".jpg", 255 - grey if inverted else grey, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
    ds = _dataset(_SECONDARY_CAPTURE, JPEGBaseline8Bit, name, patient, sex, age, view, grey.shape, 8, inverted)
    ds.ConversionType = "WSD"
    ds.LossyImageCompression = "01"
    ds.LossyImageCompressionMethod = "ISO_10918_1"
    ds.PixelData = encapsulate([data])
    ds["PixelData"].is_undefined_length = True
    ds.save_as(path, enforce_file_format=True)


def write_deep(
    path: Path,
    image: Image,
    name: str,
    patient: str,
    sex: str,
    age: int,
    view: str,
    bits: int,
    inverted: bool,
    jpeg2000: bool,
) -> None:
    """Write a 16-bit digital X-ray with ``bits`` stored and a display window (VinDr-CXR, Open-I).

    The picture fills the window only: detector values reach above and below it, so a reader that ignores the window
    sees a flat picture. ``inverted`` stores MONOCHROME1, where large values are black.
    """
    from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless

    top = 2**bits - 1
    low, high = round(0.12 * top), round(0.72 * top)
    stored = np.round(low + image * (high - low)).astype(np.uint16)
    stored[:2, :] = 0  # collimated edge and a lead marker: beyond the window on either side
    stored[-3:, -12:] = top
    if inverted:
        stored, low, high = (top - stored).astype(np.uint16), top - high, top - low
    ds = _dataset(_DIGITAL_XRAY, ExplicitVRLittleEndian, name, patient, sex, age, view, stored.shape, bits, inverted)
    ds.WindowCenter = (low + high) // 2
    ds.WindowWidth = high - low
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = 0, 1, "US"
    ds.PixelData = stored.tobytes()
    ds["PixelData"].VR = "OW"
    if jpeg2000:
        ds.compress(JPEG2000Lossless, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)


def _dataset(
    kind: str,
    syntax: str,
    name: str,
    patient: str,
    sex: str,
    age: int,
    view: str,
    shape: tuple[int, ...],
    bits: int,
    inverted: bool,
) -> Dataset:
    """The header common to all; nothing in it depends on the clock."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = kind
    meta.MediaStorageSOPInstanceUID = name
    meta.TransferSyntaxUID = UID(syntax)
    meta.ImplementationClassUID = "2.25.1"
    ds = Dataset()
    ds.file_meta = meta
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.SOPClassUID, ds.SOPInstanceUID = kind, name
    ds.StudyInstanceUID, ds.SeriesInstanceUID = f"{name}.1"[-60:], f"{name}.2"[-60:]
    ds.StudyDate, ds.StudyTime, ds.Modality = "19010101", "000000.00", "CR" if bits == 8 else "DX"
    ds.SeriesDescription = f"PHANTOM view: {view}"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = "PHANTOM", patient, ""
    ds.PatientSex, ds.PatientAge = sex, f"{age:03d}Y"
    ds.BodyPartExamined, ds.ViewPosition = "CHEST", view
    ds.Rows, ds.Columns = shape
    ds.PixelSpacing = [0.6, 0.6]
    ds.SamplesPerPixel, ds.PixelRepresentation = 1, 0
    ds.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = (8, 8, 7) if bits == 8 else (16, bits, bits - 1)
    return ds
