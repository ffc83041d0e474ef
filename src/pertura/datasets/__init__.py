"""Public data and simulated data.

Files come from the cache (``PERTURA_DATA_DIR`` or the system's) or from their public address, pinned by
SHA256. ``pertura datasets list`` shows the data sets with their keys, ``pertura datasets fill SOURCE`` fills the
cache from a folder.
"""

from __future__ import annotations

import lazy_loader

# Loaders are imported on first use: `import pertura.datasets` loads neither pandas nor anndata.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_beeline": ["BeelineLabels", "beeline_curated", "beeline_labels", "beeline_mdc"],
        "_beeline_archive": ["beeline"],
        "_crispr": ["norman_mcfaline_mini", "papalexi_2021"],
        "_drugs": ["lincs_l1000_ht115", "repurposing_hub", "tggates_hepatocytes"],
        "_fetch": [
            "DataFile",
            "DataHashMismatch",
            "DataNotAvailable",
            "cache_dir",
            "fetch",
            "fill_cache",
            "registry",
        ],
        "_networks": ["biobert_mesc500", "dorothea", "gene_sets", "motif_network", "ppi", "trrust"],
        "_sachs": ["sachs_2005"],
        "_signatures": ["op3_2023", "sciplex_2020", "tahoe_2025"],
        "_simulate": ["simulate"],
        "_simulate_truth": ["true_effects", "true_network"],
        "_stimulation": ["kang_2018_mini", "kang_2018_wide"],
    },
)
