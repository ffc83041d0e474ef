"""Publications behind the data."""

from __future__ import annotations

from typing import Final

_BEELINE = (
    "Pratapa et al. 2020, Benchmarking algorithms for gene regulatory network inference from single-cell "
    "transcriptomic data, Nat Methods 17:147-154, doi:10.1038/s41592-019-0690-6"
)
_HURI = (
    "Luck et al. 2020, A reference map of the human binary protein interactome, Nature 580:402-408, "
    "doi:10.1038/s41586-020-2188-x"
)
_KANG = (
    "Kang et al. 2018, Multiplexed droplet single-cell RNA-sequencing using natural genetic variation, "
    "Nat Biotechnol 36:89-94, doi:10.1038/nbt.4042"
)

CITATIONS: Final[dict[str, str]] = {
    "papalexi_2021": (
        "Papalexi et al. 2021, Characterizing the molecular regulation of inhibitory immune checkpoints with "
        "multimodal single-cell screens, Nat Genet 53:322-331, doi:10.1038/s41588-021-00778-2"
    ),
    "norman_mcfaline_mini": (
        "Norman et al. 2019, Exploring genetic interaction manifolds constructed from rich single-cell "
        "phenotypes, Science 365:786-793, doi:10.1126/science.aax4438; McFaline-Figueroa et al. 2024, "
        "Multiplex single-cell chemical genomics reveals the kinase dependence of the response to targeted "
        "therapy, Cell Genom 4:100487, doi:10.1016/j.xgen.2023.100487"
    ),
    "kang_2018_mini": _KANG,
    "kang_2018_wide": _KANG,
    "lincs_l1000_ht115": (
        "Subramanian et al. 2017, A next generation Connectivity Map: L1000 platform and the first 1,000,000 "
        "profiles, Cell 171:1437-1452, doi:10.1016/j.cell.2017.10.049; subset of Qi et al. 2024, Predicting "
        "transcriptional responses to novel chemical perturbations using deep generative model for drug "
        "discovery, Nat Commun 15:9256, doi:10.1038/s41467-024-53457-1"
    ),
    "op3_2023": (
        "Szałata et al. 2024, A benchmark for prediction of transcriptomic responses to chemical perturbations across "
        "cell types, NeurIPS Datasets and Benchmarks 37, GSE279945; rankings of the package sigrecon"
    ),
    "tahoe_2025": (
        "Zhang et al. 2025, Tahoe-100M: a giga-scale single-cell perturbation atlas for context-dependent gene function "
        "and cellular modeling, bioRxiv, doi:10.1101/2025.02.20.639398; rankings of the package sigrecon"
    ),
    "sciplex_2020": (
        "Srivatsan et al. 2020, Massively multiplex chemical transcriptomics at single-cell resolution, Science "
        "367:45-51, doi:10.1126/science.aax6234; rankings of the package sigrecon"
    ),
    "tggates_hepatocytes": (
        "Igarashi et al. 2015, Open TG-GATEs: a large-scale toxicogenomics database, Nucleic Acids Res "
        "43:D921-D927, doi:10.1093/nar/gku955"
    ),
    "beeline_mdc": (
        f"{_BEELINE}; expression: Shalek et al. 2014, Single-cell RNA-seq reveals dynamic paracrine control "
        "of cellular variation, Nature 510:363-369, doi:10.1038/nature13437"
    ),
    "beeline": _BEELINE,
    "beeline_curated": _BEELINE,
    "sachs_2005": (
        "Sachs et al. 2005, Causal protein-signaling networks derived from multiparameter single-cell data, Science "
        "308:523-529, doi:10.1126/science.1105809"
    ),
    "beeline_labels": _BEELINE,
    "huri": _HURI,
    "lit_bm": _HURI,
    "repurposing_hub": (
        "Corsello et al. 2017, The Drug Repurposing Hub: a next-generation drug library and information "
        "resource, Nat Med 23:405-408, doi:10.1038/nm.4306"
    ),
    "trrust_human": (
        "Han et al. 2018, TRRUST v2: an expanded reference database of human and mouse transcriptional "
        "regulatory interactions, Nucleic Acids Res 46:D380-D386, doi:10.1093/nar/gkx1013"
    ),
    "dorothea_human": (
        "Garcia-Alonso et al. 2019, Benchmark and integration of resources for the estimation of human "
        "transcription factor activities, Genome Res 29:1363-1375, doi:10.1101/gr.240663.118"
    ),
    "motif_grn_mm10": (
        "Kamimoto et al. 2023, Dissecting cell identity via network inference and in silico gene perturbation, Nature "
        "614:742-751, doi:10.1038/s41586-022-05688-9"
    ),
    "hallmark": (
        "Liberzon et al. 2015, The Molecular Signatures Database hallmark gene set collection, Cell Syst "
        "1:417-425, doi:10.1016/j.cels.2015.12.004"
    ),
    "go_bp": (
        "The Gene Ontology Consortium 2021, The Gene Ontology resource: enriching a GOld mine, Nucleic Acids "
        "Res 49:D325-D334, doi:10.1093/nar/gkaa1113"
    ),
    "coessential_modules": (
        "Wainberg et al. 2021, A genome-wide atlas of co-essential modules assigns function to uncharacterized genes, Nat Genet "
        "53:638-649, doi:10.1038/s41588-021-00840-z"
    ),
    "biobert_mesc500": (
        "Wang et al. 2024, scGREAT: Transformer-based deep-language model for gene regulatory network "
        "inference from single-cell transcriptomics, iScience 27:109352, doi:10.1016/j.isci.2024.109352; "
        "BioBERT: Lee et al. 2020, Bioinformatics 36:1234-1240, doi:10.1093/bioinformatics/btz682"
    ),
}
"""Citation by data set (or by registry key, where a data set is one file)."""
