"""Gene symbols of data and of tables: exact, without case, mouse and outdated names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

# Symbols of mouse whose human counterpart is called otherwise, and symbols that were replaced: those frequent in expression
# data and without ambiguity (Mll2, which was two genes, is not here). Tried after the name itself.
_OTHER_SYMBOLS = dict(
    pair.split(":")
    for pair in """
    TRP53:TP53 TRP63:TP63 TRP73:TP73 TCFAP2A:TFAP2A TCFAP2B:TFAP2B TCFAP2C:TFAP2C TCFE3:TFE3 TCFEB:TFEB TCFEC:TFEC
    SFPI1:SPI1 MYST1:KAT8 MYST2:KAT7 MYST3:KAT6A MYST4:KAT6B WHSC1:NSD2 WHSC1L1:NSD3 CSDA:YBX3 MKL1:MRTFA
    MKL2:MRTFB AES:TLE5 RDBP:NELFE TCEB1:ELOC TCEB2:ELOB TCEB3:ELOA CCRN4L:NOCT T:TBXT
    H2-AA:HLA-DQA1 H2-AB1:HLA-DQB1 H2-EB1:HLA-DRB1 H2-DMA:HLA-DMA H2-DMB1:HLA-DMB FCGR3:FCGR3A CD24A:CD24 LYZ1:LYZ LYZ2:LYZ
    HPRT:HPRT1 TRF:TF FTL1:FTL TXN1:TXN PKM2:PKM CYB5:CYB5A TUBB5:TUBB H2AFV:H2AZ2 H2AFZ:H2AZ1 H2AFX:H2AX H3F3A:H3-3A
    H3F3B:H3-3B H1F0:H1-0 SEPT2:SEPTIN2 SEPT7:SEPTIN7 SEPT9:SEPTIN9 SHFM1:SEM1 SEPW1:SELENOW SEP15:SELENOF SELK:SELENOK
    GNB2L1:RACK1 LASS2:CERS2 LASS5:CERS5 TM7SF4:DCSTAMP TMEM49:VMP1 BRP44L:MPC1 ATPIF1:ATP5IF1
    ATP5A1:ATP5F1A ATP5B:ATP5F1B ATP5C1:ATP5F1C ATP5D:ATP5F1D ATP5E:ATP5F1E ATP5F1:ATP5PB ATP5G1:ATP5MC1 ATP5G2:ATP5MC2
    ATP5G3:ATP5MC3 ATP5H:ATP5PD ATP5J:ATP5PF ATP5J2:ATP5MF ATP5L:ATP5MG ATP5O:ATP5PO
    """.split()
)


def match_genes(
    names: Iterable[str], known: Iterable[str], *, aliases: Mapping[str, str] | None = None
) -> NDArray[np.intp]:
    """Positions of genes among the names of a table.

    Parameters
    ----------
    names
        Symbols to look up, of human or mouse.
    known
        Symbols of the table, of human or mouse.
    aliases
        Symbol to the symbol in the table, before anything else is tried: orthologues whose symbols differ.

    Returns
    -------
    ``(n_names,)`` positions in `known`, -1 where there is none. A name matches exactly, else without case (mouse ``Stat1`` and
    human ``STAT1``), else by a short list of mouse and outdated symbols (``Trp53`` and ``TP53``). Most orthologues share
    their symbol, not all: pass a table of orthologues as `aliases` where it matters.
    """
    wanted = pd.Index([str(n) for n in names])
    table = pd.Index([str(k) for k in known])
    wanted = wanted.map(lambda n: str((aliases or {}).get(n, n)))
    return _locate(wanted, table)


def _locate(wanted: pd.Index, table: pd.Index) -> NDArray[np.intp]:
    upper_wanted, upper_table = wanted.str.upper(), table.str.upper()
    backward = {new: old for old, new in _OTHER_SYMBOLS.items()}
    tries = [
        (wanted, table),
        (upper_wanted, upper_table),
        (upper_wanted.map(lambda n: _OTHER_SYMBOLS.get(n, n)), upper_table),
        (upper_wanted.map(lambda n: backward.get(n, n)), upper_table),
    ]
    found = np.full(len(wanted), -1, dtype=np.intp)
    for names, known in tries:
        first = ~known.duplicated()
        positions = np.append(np.flatnonzero(first), -1)[known[first].get_indexer(names)]
        found = np.where(found < 0, positions, found)
    return found


def symbols(adata: AnnData, symbol_key: str | None) -> pd.Index:
    """Symbols of the genes of `adata`: ``var_names``, or a column of ``var``."""
    if symbol_key is None:
        return pd.Index(adata.var_names.astype(str))
    if symbol_key not in adata.var:
        raise ValueError(
            f"`symbol_key`: `adata.var` has no column {symbol_key!r} (columns: {list(adata.var.columns)[:10]})."
        )
    return pd.Index(adata.var[symbol_key].astype(str))


def check_free(key: str, overwrite: bool, **where: object) -> None:
    """Raise if `key` is taken in one of the named mappings of an AnnData."""
    taken = [name for name, mapping in where.items() if key in mapping]
    if taken and not overwrite:
        raise ValueError(f"`key_added`: {key!r} is in `adata.{taken[0]}` already. Choose another, or `overwrite=True`.")


def no_match(argument: str, table: Iterable[str], genes: pd.Index) -> ValueError:
    """What to say where no gene of the table is in the data."""
    shown = ", ".join(list(dict.fromkeys(map(str, table)))[:3])
    return ValueError(
        f"`{argument}`: none of its genes ({shown}, …) is among the {len(genes)} genes of the data "
        f"({', '.join(genes[:3])}, …). Both must be gene symbols; where `var_names` are not, name the column of `var` that "
        "has them as `symbol_key`."
    )
