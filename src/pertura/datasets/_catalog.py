"""The data sets by name, for the command line: sizes and keys are facts of pinned files."""

from __future__ import annotations

from typing import Final, NamedTuple


class Entry(NamedTuple):
    """What a data set is.

    Attributes
    ----------
    rows, genes
        Size.
    keys
        Arguments of ``setup_anndata``, empty where nothing was perturbed.
    about
        What was measured.
    files
        Keys of the registry.
    """

    rows: int
    genes: int
    keys: dict[str, str]
    about: str
    files: tuple[str, ...]


_COMPOUNDS: Final = {
    "perturbation_key": "perturbation",
    "control": "control",
    "dose_key": "dose",
    "context_key": "cell_type",
}
_SIGNATURES: Final = {
    "perturbation_key": "perturbation",
    "context_key": "cell_type",
    "values": "effects",
    "delimiter": "|",
}

CATALOG: Final[dict[str, Entry]] = {
    "kang_2018_mini": Entry(
        1556,
        1267,
        {"perturbation_key": "condition", "control": "ctrl", "context_key": "cell_type", "layer": "counts"},
        "interferon-beta, five blood cell types (part of the package)",
        ("kang_2018_mini",),
    ),
    "kang_2018_wide": Entry(
        2000,
        9015,
        {"perturbation_key": "condition", "control": "ctrl", "layer": "counts"},
        "interferon-beta, blood cells without labels of cell types",
        ("kang_2018_wide",),
    ),
    "papalexi_2021": Entry(
        20729,
        299,
        {"perturbation_key": "perturbation", "control": "control", "batch_key": "replicate", "layer": "counts"},
        "25 CRISPR knock-outs in THP-1 cells, with guide calls",
        ("papalexi_2021",),
    ),
    "norman_mcfaline_mini": Entry(
        5961,
        500,
        {"perturbation_key": "perturbation", "control": "control", "context_key": "cell_type"},
        "CRISPRa pairs in K562, CRISPRi in three glioblastoma lines (log1p, no counts)",
        ("norman_mcfaline_mini",),
    ),
    "lincs_l1000_ht115": Entry(681, 978, _COMPOUNDS, "349 compounds with doses, bulk (log2)", ("lincs_l1000_ht115",)),
    "tggates_hepatocytes": Entry(
        2382, 196, _COMPOUNDS, "146 compounds, three doses and times, bulk hepatocytes (log2)", ("tggates_hepatocytes",)
    ),
    "op3_2023": Entry(
        405, 6349, _SIGNATURES, "135 compounds in three blood cell types (rankings)", ("op3_b", "op3_nk", "op3_t")
    ),
    "tahoe_2025": Entry(
        860,
        8268,
        _SIGNATURES,
        "109 compounds in eight cancer lines (rankings)",
        tuple(
            f"tahoe_{line}" for line in ("a498", "hec_1_a", "lovo", "miapaca_2", "nci_h23", "snu_1", "snu_423", "sw48")
        ),
    ),
    "sciplex_2020": Entry(
        69,
        5834,
        _SIGNATURES,
        "23 compounds in three cancer lines (rankings)",
        ("sciplex_a549", "sciplex_k562", "sciplex_mcf7"),
    ),
    "sachs_2005": Entry(
        7466,
        11,
        {"perturbation_key": "perturbation", "control": "control"},
        "proteins of T cells under inhibitors, with a known network (log)",
        ("sachs_2005", "sachs_2005_graph"),
    ),
    "beeline_mdc": Entry(383, 821, {}, "dendritic cells with known networks (log)", ("beeline_mdc_expression",)),
}
