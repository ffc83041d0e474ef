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
    "sachs_2005": Entry(
        7466,
        11,
        {"perturbation_key": "perturbation", "control": "control"},
        "proteins of T cells under inhibitors, with a known network (log)",
        ("sachs_2005", "sachs_2005_graph"),
    ),
    "beeline_mdc": Entry(383, 821, {}, "dendritic cells with known networks (log)", ("beeline_mdc_expression",)),
}
