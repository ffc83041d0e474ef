"""What is known before the data: networks, descriptions of drugs, embeddings."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_drugs": [
            "SentenceEncoder",
            "TextEncoder",
            "TfidfEncoder",
            "describe_drugs",
            "drug_table",
            "match_drugs",
            "signatures",
        ],
        "_edges": ["known_edges", "regulators"],
        "_genes": ["gene_embeddings"],
        "_ppi": ["ppi_network"],
        "_symbols": ["match_genes"],
    },
)
