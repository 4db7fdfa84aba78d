"""The sentences phantom reports are made of: what affirms a finding and what denies it."""

from __future__ import annotations

# Affirming sentences. {side} right/left/bilateral, {lobe} e.g. "right upper lobe", {zone} e.g. "right upper zone",
# {sev} severity followed by a blank. The first of each kind is the short form of an impression.
AFFIRM: dict[str, tuple[str, ...]] = {
    "cardiomegaly": (
        "{sev}cardiomegaly.",
        "Cardiomegaly.",
        "The heart is {adv}enlarged, consistent with {sev}cardiomegaly.",
        "{sev}enlargement of the cardiac silhouette; cardiomegaly is present.",
        "There is {sev}cardiomegaly with a widened cardiac silhouette.",
    ),
    "enlarged cardiomediastinum": (
        "{sev}enlarged cardiomediastinum.",
        "The mediastinum is {adv}widened.",
        "{sev}widening of the upper mediastinal contour.",
    ),
    "pleural effusion": (
        "{sev}{side} pleural effusion.",
        "Pleural effusion.",
        "There is a {sev}{side} pleural effusion with blunting of the costophrenic angle.",
        "{sev}{side} pleural effusion layers at the lung base, forming a meniscus.",
        "Blunted {side} costophrenic angle due to a {sev}pleural effusion.",
    ),
    "pneumothorax": (
        "{sev}{side} pneumothorax.",
        "Pneumothorax.",
        "There is a {sev}{side} pneumothorax with a visible pleural line.",
        "{sev}{side} apicolateral pneumothorax, lung markings absent beyond the pleural line.",
        "A {sev}pneumothorax is present on the {side}.",
    ),
    "consolidation": (
        "{lobe} consolidation.",
        "Consolidation.",
        "Dense consolidation in the {lobe} with air bronchograms.",
        "There is airspace consolidation in the {lobe}, a lung opacity.",
        "Focal lung opacity in the {zone} represents consolidation.",
    ),
    "pneumonia": (
        "{lobe} pneumonia.",
        "Pneumonia.",
        "Patchy {lobe} opacity, findings suggesting pneumonia.",
        "Findings suggesting pneumonia.",
        "Findings suggesting {lobe} pneumonia.",
        "Patchy airspace lung opacity in the {zone} is consistent with pneumonia.",
        "Findings are compatible with {lobe} pneumonia.",
    ),
    "edema": (
        "{sev}pulmonary edema.",
        "Edema.",
        "{sev}pulmonary edema with perihilar haze and Kerley B lines.",
        "Bat-wing perihilar opacities and engorged vessels indicate {sev}pulmonary edema.",
        "There is {sev}interstitial pulmonary edema.",
    ),
    "atelectasis": (
        "{sev}{zone} atelectasis.",
        "Atelectasis.",
        "Plate-like atelectasis in the {zone} with a raised hemidiaphragm.",
        "{sev}linear atelectasis in the {zone}.",
        "There is {sev}bandlike atelectasis at the {zone}.",
    ),
    "nodule": (
        "Small {lobe} nodule/mass.",
        "Nodule/Mass.",
        "A round pulmonary nodule is seen in the {lobe}.",
        "Well defined solitary nodule/mass projects over the {zone}.",
        "Nodule/mass in the {lobe}.",
    ),
    "mass": (
        "Large {lobe} nodule/mass.",
        "Nodule/Mass.",
        "There is a large rounded mass in the {lobe}.",
        "A large well circumscribed nodule/mass projects over the {zone}.",
        "Nodule/mass in the {lobe}.",
    ),
    "lung tumor": (
        "{lobe} lung tumor.",
        "Lung tumor.",
        "Spiculated nodule/mass in the {lobe}, suspicious for a lung tumor.",
        "Irregular spiculated nodule/mass in the {zone}, most likely lung tumor.",
        "Nodule/mass concerning for primary lung tumor in the {lobe}.",
    ),
    "lung opacity": (
        "{lobe} lung opacity.",
        "Lung opacity.",
        "There is a hazy lung opacity in the {zone}.",
        "Ground-glass lung opacity projects over the {lobe}.",
        "Ill-defined lung opacity in the {zone}.",
    ),
    "infiltration": (
        "{lobe} infiltration.",
        "Infiltration.",
        "Mottled infiltration of the {zone}.",
        "There is patchy infiltration in the {lobe}.",
        "Fluffy infiltrates are scattered in the {zone}, in keeping with infiltration.",
    ),
    "rib fracture": (
        "{side} rib fracture.",
        "Rib fracture.",
        "Displaced {side} rib fractures with callus at the {level} lateral ribs.",
        "There is a {side} {level} rib fracture.",
        "Healing rib fracture along the {side} {level} chest wall.",
    ),
    "support devices": (
        "{device}.",
        "Support devices.",
        "{device} in place.",
        "Support device: {device}.",
        "There is a {device} in expected position.",
    ),
    "emphysema": (
        "{sev}emphysema.",
        "Emphysema.",
        "Hyperinflated lungs with flattened diaphragms, consistent with {sev}emphysema.",
        "The lungs are hyperinflated and hyperlucent, {sev}emphysema.",
    ),
    "pulmonary fibrosis": (
        "{sev}pulmonary fibrosis.",
        "Pulmonary fibrosis.",
        "Bibasilar reticular markings with volume loss, {sev}pulmonary fibrosis.",
        "Coarse basal reticulation consistent with {sev}pulmonary fibrosis.",
        "There is {sev}pulmonary fibrosis at both lung bases.",
    ),
    "ild": (
        "{sev}ILD.",
        "ILD.",
        "Diffuse reticulonodular markings throughout both lungs, {sev}interstitial lung disease (ILD).",
        "Findings of {sev}ILD with innumerable small nodules.",
        "There is {sev}diffuse interstitial lung disease, ILD.",
    ),
    "pleural thickening": (
        "{side} pleural thickening.",
        "Pleural thickening.",
        "{side} lateral and apical pleural thickening.",
        "There is {side} pleural thickening forming a rind along the chest wall.",
    ),
    "hiatal hernia": (
        "{sev}hiatal hernia.",
        "Hiatal hernia.",
        "Retrocardiac density with an air-fluid level, {sev}hiatal hernia.",
        "There is a {sev}hiatal hernia behind the heart.",
    ),
    "aortic enlargement": (
        "{sev}aortic enlargement.",
        "Aortic enlargement.",
        "The aortic knob is {adv}enlarged, aortic enlargement.",
        "There is {sev}aortic enlargement with a prominent aortic arch.",
        "Dilated thoracic aorta, {sev}aortic enlargement.",
    ),
    "calcification": (
        "{lobe} calcification.",
        "Calcification.",
        "Clustered calcification in the {lobe}.",
        "Dense calcification projects over the {zone}.",
        "There are calcified granulomas in the {zone}, benign calcification.",
    ),
    "mediastinal shift": (
        "Mediastinal shift to the {side}.",
        "Mediastinal shift.",
        "The trachea and heart are displaced to the {side}, mediastinal shift.",
        "There is mediastinal shift toward the {side}.",
    ),
    "tuberculosis": (
        "{lobe} tuberculosis.",
        "Tuberculosis.",
        "Cavitary lesion in the {lobe} with fibrotic streaks, consistent with tuberculosis.",
        "Apical cavity in the {zone}, findings of pulmonary tuberculosis.",
        "Thick-walled cavity of the {lobe}, likely tuberculosis.",
    ),
}
# Denials, one entry a topic: the kinds of which none may be present, then sentences.
DENY: tuple[tuple[frozenset[str], tuple[str, ...]], ...] = tuple(
    (frozenset(kinds.split("|")), sentences)
    for kinds, sentences in {
        "cardiomegaly": ("No cardiomegaly.", "The heart is normal in size.", "There is no cardiomegaly."),
        "pleural effusion": (
            "No pleural effusion.",
            "There is no pleural effusion.",
            "The costophrenic angles are sharp, no pleural effusion.",
        ),
        "pneumothorax": ("No pneumothorax.", "There is no pneumothorax.", "No pneumothorax is seen."),
        "consolidation": ("No consolidation.", "There is no focal consolidation.", "No evidence of consolidation."),
        "pneumonia": ("No evidence of pneumonia.", "No pneumonia.", "There is no evidence of pneumonia."),
        "edema": ("No pulmonary edema.", "No edema.", "There is no pulmonary edema."),
        "atelectasis": ("No atelectasis.", "There is no atelectasis.", "No evidence of atelectasis."),
        "nodule|mass|lung tumor": (
            "No nodule/mass.",
            "There is no pulmonary nodule or mass.",
            "No suspicious nodule or mass.",
        ),
        "lung tumor": ("No lung tumor.", "There is no evidence of lung tumor."),
        "lung opacity|consolidation|pneumonia|infiltration|edema": (
            "No lung opacity.",
            "There is no focal lung opacity.",
            "No airspace disease, no lung opacity.",
        ),
        "infiltration": ("No infiltration.", "There is no infiltration.", "No pulmonary infiltration."),
        "rib fracture": (
            "No rib fracture.",
            "There is no displaced rib fracture.",
            "The ribs are intact, no rib fracture.",
        ),
        "support devices": ("No support devices.", "No indwelling tubes or lines."),
        "emphysema": ("No emphysema.", "The lungs are not hyperinflated, no emphysema."),
        "pulmonary fibrosis": ("No pulmonary fibrosis.", "There is no pulmonary fibrosis."),
        "ild": ("No ILD.", "There is no ILD.", "No evidence of interstitial lung disease, no ILD."),
        "pleural thickening": ("No pleural thickening.", "There is no pleural thickening."),
        "hiatal hernia": ("No hiatal hernia.",),
        "aortic enlargement": (
            "No aortic enlargement.",
            "There is no aortic enlargement.",
            "The aorta is of normal caliber, no aortic enlargement.",
        ),
        "calcification": ("No calcification.", "There is no calcification.", "No abnormal calcification."),
        "mediastinal shift": (
            "No mediastinal shift.",
            "The trachea is midline, no mediastinal shift.",
            "There is no mediastinal shift.",
        ),
        "tuberculosis": (
            "No tuberculosis.",
            "There is no evidence of active tuberculosis.",
            "No cavity and no tuberculosis.",
        ),
        "enlarged cardiomediastinum": ("The mediastinal contours are normal.", "The mediastinum is not widened."),
        "pleural effusion|pneumothorax": (
            "There is no pleural effusion or pneumothorax.",
            "No pleural effusion or pneumothorax is seen.",
        ),
        "pleural effusion|consolidation": ("There is no pleural effusion or focal consolidation.",),
        "pneumothorax|consolidation|pleural effusion": ("No focal consolidation, pleural effusion, or pneumothorax.",),
    }.items()
)
NORMAL = (
    "No acute cardiopulmonary process.",
    "No acute cardiopulmonary abnormality.",
    "Normal chest radiograph.",
    "Normal chest.",
    "No acute intrathoracic process.",
)
HEALTHY = (
    "The lungs are clear.",
    "The lungs are well expanded and clear.",
    "The cardiomediastinal silhouette is normal.",
    "The hilar contours are unremarkable.",
)
BONES = (
    "The visualized osseous structures are otherwise unremarkable.",
    "The upper abdomen is unremarkable.",
    "Soft tissues are unremarkable.",
)
BREAST = ("Breast shadows overlie the lung bases.", "Breast tissue projects over the lower lungs.")
PORTABLE = (
    "Portable AP film with low lung volumes.",
    "Lung volumes are low on this portable AP view.",
    "Portable technique magnifies the heart.",
)
ADVERB = {
    "mild": "mildly ",
    "moderate": "moderately ",
    "severe": "markedly ",
    "small": "slightly ",
    "large": "markedly ",
}
