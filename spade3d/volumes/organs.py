"""Organs: one name for each across datasets (never by number), and the label tables of datasets that ship none."""

import re
from collections.abc import Mapping

# BTCV (Synapse syn3193805).
BTCV: Mapping[int, str] = {
    1: "spleen", 2: "right kidney", 3: "left kidney", 4: "gallbladder", 5: "esophagus", 6: "liver", 7: "stomach",
    8: "aorta", 9: "inferior vena cava", 10: "portal and splenic veins", 11: "pancreas", 12: "right adrenal gland",
    13: "left adrenal gland",
}  # fmt: skip

# AMOS22. Not BTCV's order: 10 is the pancreas here.
AMOS: Mapping[int, str] = {
    1: "spleen", 2: "right kidney", 3: "left kidney", 4: "gallbladder", 5: "esophagus", 6: "liver", 7: "stomach",
    8: "aorta", 9: "inferior vena cava", 10: "pancreas", 11: "right adrenal gland", 12: "left adrenal gland",
    13: "duodenum", 14: "bladder", 15: "prostate or uterus",
}  # fmt: skip

# MM-WHS 2017 and WHS++ 2024 (zmic.org.cn/care_2024/track5): the values as stored in the files.
MM_WHS: Mapping[int, str] = {
    205: "left ventricular myocardium", 420: "left atrium", 500: "left ventricle", 550: "right atrium",
    600: "right ventricle", 820: "ascending aorta", 850: "pulmonary artery",
}  # fmt: skip

_SYNONYMS: Mapping[str, str] = {
    "gall bladder": "gallbladder",
    "oesophagus": "esophagus",
    "arota": "aorta",  # the official AMOS file
    "postcava": "inferior vena cava",
    "post cava": "inferior vena cava",
    "ivc": "inferior vena cava",
    "vena cava inferior": "inferior vena cava",
    "vena cava": "inferior vena cava",
    "portal vein and splenic vein": "portal and splenic veins",
    "portal and splenic vein": "portal and splenic veins",
    "portal vein splenic vein": "portal and splenic veins",
    "splenic and portal veins": "portal and splenic veins",
    "veins": "portal and splenic veins",
    "left adrenal": "left adrenal gland",
    "right adrenal": "right adrenal gland",
    "urinary bladder": "bladder",
    "prostate uterus": "prostate or uterus",
    "prostate and uterus": "prostate or uterus",
    "small intestine": "small bowel",
    "large bowel": "colon",
    "left heart ventricle": "left ventricle",
    "right heart ventricle": "right ventricle",
    "left heart atrium": "left atrium",
    "right heart atrium": "right atrium",
    "left ventricle blood cavity": "left ventricle",
    "right ventricle blood cavity": "right ventricle",
    "left atrium blood cavity": "left atrium",
    "right atrium blood cavity": "right atrium",
    "myocardium": "left ventricular myocardium",
    "heart myocardium": "left ventricular myocardium",
    "left ventricle myocardium": "left ventricular myocardium",
    "myocardium of the left ventricle": "left ventricular myocardium",
    "aorta ascending": "ascending aorta",
}

_SIDES = {"left": "left", "l": "left", "lt": "left", "right": "right", "r": "right", "rt": "right"}


def canonical_organ(name: str) -> str:
    """The one name of an organ: lower case, words apart, side first, American spelling as most label files use.

    "Gall_Bladder" -> "gallbladder", "kidney_left" -> "left kidney", "postcava" -> "inferior vena cava".
    A name that is not known is only tidied, so that equal names stay equal and different ones different.
    """
    words = re.findall(r"[^\W_]+", name.lower())
    sides = [word for word in words if word in _SIDES]
    if len(sides) == 1 and len(words) > 1:
        words = [_SIDES[sides[0]], *(word for word in words if word not in _SIDES)]
    tidy = " ".join(words)
    return _SYNONYMS.get(tidy, tidy)
