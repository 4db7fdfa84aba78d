"""Which classes of which archive a drawn finding earns."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.phantom.findings import Finding

CHEXPERT = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
CHEXPERT5 = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
VINDR = (
    "Aortic enlargement",
    "Atelectasis",
    "Calcification",
    "Cardiomegaly",
    "Clavicle fracture",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Enlarged PA",
    "ILD",
    "Infiltration",
    "Lung Opacity",
    "Lung cavity",
    "Lung cyst",
    "Mediastinal shift",
    "Nodule/Mass",
    "Pleural effusion",
    "Pleural thickening",
    "Pneumothorax",
    "Pulmonary fibrosis",
    "Rib fracture",
    "Other lesion",
    "COPD",
    "Lung tumor",
    "Pneumonia",
    "Tuberculosis",
    "Other diseases",
    "No finding",
)

_CHEXPERT = {
    "cardiomegaly": ("Cardiomegaly",),
    "enlarged cardiomediastinum": ("Enlarged Cardiomediastinum",),
    "pleural effusion": ("Pleural Effusion",),
    "pneumothorax": ("Pneumothorax",),
    "consolidation": ("Consolidation", "Lung Opacity"),
    "pneumonia": ("Pneumonia", "Lung Opacity"),
    "edema": ("Edema",),
    "atelectasis": ("Atelectasis",),
    "nodule": ("Lung Lesion",),
    "mass": ("Lung Lesion",),
    "lung tumor": ("Lung Lesion",),
    "lung opacity": ("Lung Opacity",),
    "infiltration": ("Lung Opacity",),
    "rib fracture": ("Fracture",),
    "support devices": ("Support Devices",),
    "pleural thickening": ("Pleural Other",),
    "ild": ("Lung Opacity",),
    "pulmonary fibrosis": ("Lung Opacity",),
    "tuberculosis": ("Lung Opacity",),
}
_NIH = {
    "cardiomegaly": "Cardiomegaly",
    "pleural effusion": "Effusion",
    "pneumothorax": "Pneumothorax",
    "consolidation": "Consolidation",
    "pneumonia": "Pneumonia",
    "edema": "Edema",
    "atelectasis": "Atelectasis",
    "nodule": "Nodule",
    "mass": "Mass",
    "lung tumor": "Mass",
    "lung opacity": "Infiltration",
    "infiltration": "Infiltration",
    "emphysema": "Emphysema",
    "pulmonary fibrosis": "Fibrosis",
    "pleural thickening": "Pleural_Thickening",
    "hiatal hernia": "Hernia",
}
_VINDR = {
    "cardiomegaly": ("Cardiomegaly",),
    "pleural effusion": ("Pleural effusion",),
    "pneumothorax": ("Pneumothorax",),
    "consolidation": ("Consolidation", "Lung Opacity"),
    "pneumonia": ("Pneumonia", "Lung Opacity"),
    "edema": ("Edema",),
    "atelectasis": ("Atelectasis",),
    "nodule": ("Nodule/Mass",),
    "mass": ("Nodule/Mass",),
    "lung tumor": ("Lung tumor", "Nodule/Mass"),
    "lung opacity": ("Lung Opacity",),
    "infiltration": ("Infiltration",),
    "rib fracture": ("Rib fracture",),
    "emphysema": ("Emphysema", "COPD"),
    "pulmonary fibrosis": ("Pulmonary fibrosis",),
    "ild": ("ILD",),
    "pleural thickening": ("Pleural thickening",),
    "hiatal hernia": ("Other diseases",),
    "enlarged cardiomediastinum": ("Other lesion",),
    "support devices": (),
    "aortic enlargement": ("Aortic enlargement",),
    "calcification": ("Calcification",),
    "mediastinal shift": ("Mediastinal shift",),
    "tuberculosis": ("Tuberculosis", "Lung cavity"),
}


def chexpert(findings: Iterable[Finding]) -> set[str]:
    """CheXpert classes that are positive. "No Finding" means nothing but devices, as in the archive."""
    found = {name for f in findings for name in _CHEXPERT.get(f.kind, ())}
    return found if found - {"Support Devices"} else found | {"No Finding"}


def nih(findings: Iterable[Finding]) -> list[str]:
    """ChestX-ray14 labels in alphabetical order; ["No Finding"] where there is none."""
    return sorted({_NIH[f.kind] for f in findings if f.kind in _NIH}) or ["No Finding"]


def vindr(findings: Iterable[Finding]) -> set[str]:
    """VinDr-CXR classes that are positive."""
    return {name for f in findings for name in _VINDR.get(f.kind, ())} or {"No finding"}
