"""Networks, gene sets and gene embeddings."""

from __future__ import annotations

from typing import Literal, overload

import numpy as np
import pandas as pd

from ._common import choose, describe
from ._fetch import fetch
from ._r import read_rda_columns

__all__ = ["biobert_mesc500", "dorothea", "gene_sets", "motif_network", "ppi", "trrust"]


def ppi(resource: Literal["huri", "lit_bm"] = "huri") -> pd.DataFrame:
    """Binary protein-protein interactions of human, by gene symbol.

    Parameters
    ----------
    resource
        ``"huri"``: the systematic yeast two-hybrid map, 52,569 pairs in the source (52,548 by symbol);
        ``"lit_bm"``: pairs with at least two pieces of evidence in the literature, 13,441 in the source
        (11,711 by symbol).

    Returns
    -------
    One row per pair, undirected (``source`` <= ``target`` in the alphabet, no pair twice, self-interactions
    kept): ``source``, ``target``, ``weight`` (1), ``source_ensembl``, ``target_ensembl``, and the evidence:
    ``n_screens`` of 9 (HuRI) or ``n_publications``, ``n_methods``, ``n_evidences`` (Lit-BM). Pairs with a
    gene that is not in the ORFeome's table of symbols are left out (HuRI: none; Lit-BM: 1,730 pairs); their
    number is in ``attrs["n_unmapped"]``. ``attrs["dataset"]``: provenance.

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has a file.
    ValueError
        ``resource`` is unknown.

    References
    ----------
    Luck et al. 2020, Nature 580:402-408.
    """
    choose("resource", resource, ("huri", "lit_bm"))
    pairs = pd.read_csv(fetch(resource), sep="\t")
    orfs = pd.read_csv(fetch("huri_symbols"), sep="\t", usecols=["ensembl_gene_id", "symbol"])
    orfs["ensembl_gene_id"] = orfs["ensembl_gene_id"].str.partition(".")[0]  # without the version
    symbol = orfs.drop_duplicates("ensembl_gene_id").set_index("ensembl_gene_id")["symbol"]

    ensembl = pairs.iloc[:, :2].to_numpy(dtype=str)
    names = np.column_stack([symbol.reindex(ensembl[:, i]).to_numpy(dtype=object) for i in (0, 1)])
    mapped = ~pd.isna(names).any(axis=1)
    ensembl, names = ensembl[mapped], names[mapped].astype(str)
    order = np.argsort(names, axis=1, kind="stable")
    ensembl, names = (np.take_along_axis(array, order, axis=1) for array in (ensembl, names))
    evidence = pairs.loc[mapped].iloc[:, 2:].reset_index(drop=True)
    if resource == "huri":
        evidence = evidence.filter(regex="^in_screen_").sum(axis=1).to_frame("n_screens")
    table = pd.DataFrame(
        {
            "source": names[:, 0],
            "target": names[:, 1],
            "weight": 1.0,
            "source_ensembl": ensembl[:, 0],
            "target_ensembl": ensembl[:, 1],
        }
    ).join(evidence)
    table = table.drop_duplicates(["source", "target"], ignore_index=True)
    table.attrs["dataset"] = describe(resource, resource, "huri_symbols")
    table.attrs["n_unmapped"] = int((~mapped).sum())
    return table


def trrust(*, signed: bool = False) -> pd.DataFrame:
    """TRRUST v2: transcriptional regulation in human, curated from the literature.

    Parameters
    ----------
    signed
        Keep only pairs whose mode is known and undisputed, with weight 1 (activation) or -1 (repression).
        Default: all pairs, with weight 1.

    Returns
    -------
    One row per pair: ``source``, ``target``, ``weight``, ``mode`` (``"activation"``, ``"repression"``,
    ``"both"``: papers disagree, ``"unknown"``), ``n_references``. 8,427 pairs (of 9,396 rows), 4,652 signed
    ones. ``attrs["dataset"]``: provenance.

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has the file.

    References
    ----------
    Han et al. 2018, Nucleic Acids Res 46:D380-D386.
    """
    rows = pd.read_csv(
        fetch("trrust_human"),
        sep="\t",
        names=["source", "target", "mode", "references"],
        dtype=str,
        keep_default_na=False,
    )
    rows["activation"] = rows["mode"] == "Activation"
    rows["repression"] = rows["mode"] == "Repression"
    by_pair = rows.groupby(["source", "target"], sort=False)
    flags = by_pair[["activation", "repression"]].any()
    references = rows.assign(reference=rows["references"].str.split(";")).explode("reference")
    flags["n_references"] = references.groupby(["source", "target"], sort=False)["reference"].nunique()
    flags["mode"] = np.select(
        [flags["activation"] & flags["repression"], flags["activation"], flags["repression"]],
        ["both", "activation", "repression"],
        default="unknown",
    )
    table = flags.reset_index()
    table.insert(2, "weight", 1.0)
    if signed:
        table = table[table["mode"].isin(["activation", "repression"])].reset_index(drop=True)
        table["weight"] = np.where(table["mode"] == "activation", 1.0, -1.0)
    table = table[["source", "target", "weight", "mode", "n_references"]]
    table.attrs["dataset"] = describe("trrust_human")
    return table


def dorothea(levels: str = "ABC") -> pd.DataFrame:
    """DoRothEA: transcription factors and targets in human, with confidence.

    Parameters
    ----------
    levels
        Confidence levels to keep, from ``"A"`` (curated, several lines of evidence) to ``"E"``
        (computational). A to C have 13,223 edges, A to E 454,504.

    Returns
    -------
    One row per edge: ``source``, ``target``, ``weight`` (mode of regulation, 1 or -1), ``confidence``.
    ``attrs["dataset"]``: provenance.

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has the file.
    ValueError
        ``levels`` is empty or has a letter beyond A to E.

    References
    ----------
    Garcia-Alonso et al. 2019, Genome Res 29:1363-1375.
    """
    if not levels or not set(levels) <= set("ABCDE"):
        raise ValueError(f"`levels` is {levels!r}; give one or more of the letters 'ABCDE', such as 'ABC'.")
    table = read_rda_columns(fetch("dorothea_human"))
    table = table[table["confidence"].isin(list(levels))].reset_index(drop=True)
    table = table.rename(columns={"tf": "source", "mor": "weight"})[["source", "target", "weight", "confidence"]]
    table.attrs["dataset"] = describe("dorothea_human")
    return table


def motif_network() -> pd.DataFrame:
    """Regulators of mouse whose binding motif is in the promoter of a gene: edges that come from sequence, not from the literature.

    Returns
    -------
    One row per pair: ``source``, ``target``, ``weight`` (1), 1,079 regulators, 24,541 genes and 2,678,188 pairs by mouse symbol. A motif does not say that the
    regulator binds in a given type of cell. ``attrs["dataset"]``: provenance.

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has the file.
    ImportError
        pyarrow, which reads the file, is not installed.

    References
    ----------
    Kamimoto et al. 2023, Nature 614:742-751.
    """
    path = fetch("motif_grn_mm10")
    try:
        table = pd.read_parquet(path, engine="pyarrow")
    except ImportError as error:
        raise ImportError("`motif_network` needs pyarrow to read its file: pip install 'pertura[motif]'.") from error
    # one row per peak; a gene has several
    regulators = table.columns.drop(["peak_id", "gene_short_name"])
    of_row, genes = pd.factorize(table["gene_short_name"], sort=True)
    found = np.zeros((len(genes), len(regulators)), dtype=bool)
    row, column = np.nonzero(table[regulators].to_numpy())
    found[of_row[row], column] = True
    target, source = np.nonzero(found)
    edges = pd.DataFrame({"source": regulators[source], "target": genes[target], "weight": 1.0})
    edges.attrs["dataset"] = describe("motif_grn_mm10")
    return edges


@overload
def gene_sets(
    collection: Literal["hallmark", "go_bp", "coessential_modules"] = ..., *, as_frame: Literal[False] = ...
) -> dict[str, list[str]]: ...
@overload
def gene_sets(
    collection: Literal["hallmark", "go_bp", "coessential_modules"] = ..., *, as_frame: Literal[True]
) -> pd.DataFrame: ...
def gene_sets(
    collection: Literal["hallmark", "go_bp", "coessential_modules"] = "hallmark", *, as_frame: bool = False
) -> dict[str, list[str]] | pd.DataFrame:
    """Gene sets of human, by gene symbol.

    Parameters
    ----------
    collection
        ``"hallmark"``: 50 sets of MSigDB 6.0; ``"go_bp"``: 6,036 biological processes of the Gene Ontology
        2021. ``"coessential_modules"``: 1,892 modules of genes whose knock-outs change the fitness of cell lines alike, which
        do not come from the literature.
    as_frame
        Return a table instead of a dictionary.

    Returns
    -------
    Name of the set to its genes; as a table: ``source`` (the set), ``target`` (the gene), ``weight`` (1),
    with provenance in ``attrs["dataset"]``.

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has the file.
    ValueError
        ``collection`` is unknown.

    References
    ----------
    Liberzon et al. 2015, Cell Syst 1:417-425; The Gene Ontology Consortium 2021, Nucleic Acids Res
    49:D325-D334; Wainberg et al. 2021, Nat Genet 53:638-649.
    """
    choose("collection", collection, ("hallmark", "go_bp", "coessential_modules"))
    lines = fetch(collection).read_text(encoding="utf-8").splitlines()
    fields, first = [line.split("\t") for line in lines if line], 2
    if collection == "coessential_modules":  # a table with a header whose last columns have the genes
        first = fields.pop(0).index("Genes")
    sets = {name: [gene for gene in genes[first - 1 :] if gene] for name, *genes in fields}
    if not as_frame:
        return sets
    table = pd.Series(sets).explode().rename_axis("source").reset_index(name="target").assign(weight=1.0)
    table.attrs["dataset"] = describe(collection)
    return table


def biobert_mesc500() -> pd.DataFrame:
    """BioBERT vectors of 1,120 mouse gene names (the genes of BEELINE mESC TFs+500).

    Returns
    -------
    Genes x 768, float32. Index: gene names, upper case as BEELINE has them. ``attrs["dataset"]``: provenance.

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has a file.
    ValueError
        The number of vectors is not that of the genes.

    Notes
    -----
    The source is an unlabelled array of 1,121 rows. Its published script writes the column ``Gene`` of
    BEELINE's ``Target.csv`` with its header to a text file and embeds that file line by line: row 0 is the
    word "Gene" and is dropped, the others follow ``Target.csv``. The order checks out: the nearest neighbour
    of a gene's centred vector begins with the same three letters for 53 % of the genes, and for less than 1 %
    when the names are shifted by one.

    The raw vectors are highly anisotropic (mean correlation 0.86): centre them and reduce their dimension
    before use.

    References
    ----------
    Wang et al. 2024, iScience 27:109352 (scGREAT); Lee et al. 2020, Bioinformatics 36:1234-1240 (BioBERT).
    """
    vectors = np.load(fetch("biobert_mesc500"))[1:]
    genes = pd.read_csv(fetch("beeline_mesc_specific_target"), index_col=0)["Gene"]
    if len(vectors) != len(genes):
        raise ValueError(f"There are {len(vectors)} vectors, but {len(genes)} genes.")
    table = pd.DataFrame(vectors, index=pd.Index(genes, name="gene"))
    table.attrs["dataset"] = describe("biobert_mesc500", "biobert_mesc500", "beeline_mesc_specific_target")
    return table
