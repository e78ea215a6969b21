"""What a method is called where people read it; needs neither torch nor the method itself."""

NAMES = {
    "none": "nothing pruned",
    "hivtp": "HIVTP",
    "fopru": "FoPru",
    "visionzip": "VisionZip",
    "prumerge": "PruMerge",
    "prumerge_plus": "PruMerge+",
    "hired": "HiRED",
    "vispruner": "VisPruner",
    "divprune": "DivPrune",
    "hiprune": "HiPrune",
    "scope": "SCOPE",
    "holov": "HoloV",
    "cdpruner": "CDPruner",
    "fastv": "FastV",
    "pdrop": "PDrop",
    "sparsevlm": "SparseVLM",
    "dart": "DART",
    "uniform": "uniform grid",
    "avgpool": "average pooling",
}


def display_name(pruner: str) -> str:
    """`HIVTP` for `hivtp`; the class of a method of one's own, `path/file.py:Mine`: `Mine`."""
    return NAMES.get(pruner) or pruner.rpartition(":")[2]
