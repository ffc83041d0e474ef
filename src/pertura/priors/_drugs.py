"""Descriptions of drugs: texts as vectors, signatures from training rows, both in one table."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from ._drug_names import plain, synonyms

logger = logging.getLogger(__name__)

SIGNATURE = "signature:"
_FIELDS = {"moa": "mechanism", "target": "targets", "indication": "indication", "disease_area": "disease area"}
_TARGET_WORDS = re.compile(
    r"\b\w*(inhibitor|agonist|antagonist|blocker|modulator|receptor|kinase|channel|activator|stimulant|ligand)s?\b",
    re.I,
)


class TextEncoder(Protocol):
    """What turns texts into vectors."""

    def fit(self, texts: Sequence[str]) -> TextEncoder:
        """Learn from texts, if there is something to learn."""

    def transform(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors, ``(n_texts, n)``; an empty text is a row of zeros."""


class TfidfEncoder:
    """Words, pairs of words and pieces of words, weighted by how rare they are, in few components of length 1.

    Parameters
    ----------
    n_components
        Most components of the singular value decomposition.
    """

    def __init__(self, n_components: int = 64) -> None:
        self.n_components = n_components

    def fit(self, texts: Sequence[str]) -> TfidfEncoder:
        """Learn vocabulary and components from the texts that are not empty."""
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_union

        some = [t for t in texts if t.strip()]
        if len(some) < 2:
            raise ValueError(f"`texts`: {len(some)} of {len(texts)} texts are not empty, but 2 are needed.")
        self._words = make_union(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, max_features=20_000),
        ).fit(some)
        matrix = self._words.transform(some)
        n = max(1, min(self.n_components, min(matrix.shape) - 1))
        self._svd = TruncatedSVD(n, random_state=0).fit(matrix)
        return self

    def transform(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of length 1, ``(n_texts, n_components)``."""
        vectors = self._svd.transform(self._words.transform(list(texts)))
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return (vectors * [[bool(t.strip())] for t in texts]).astype(np.float32)


class SentenceEncoder:
    """A sentence transformer read from a folder (extra ``text``); it is not trained here.

    Parameters
    ----------
    path
        Folder of the model.
    """

    def __init__(self, path: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError("`SentenceEncoder` needs sentence-transformers: pip install pertura[text]") from error
        self._model = SentenceTransformer(str(path), device="cpu")

    def fit(self, texts: Sequence[str]) -> SentenceEncoder:
        """Nothing to learn."""
        return self

    def transform(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of length 1."""
        vectors = self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return (np.asarray(vectors) * [[bool(t.strip())] for t in texts]).astype(np.float32)


def match_drugs(names: Iterable[str], table: pd.DataFrame, *, aliases: Mapping[str, str] | None = None) -> pd.Series:
    """Rows of a table of drugs for names that may be spelled otherwise.

    Parameters
    ----------
    names
        Names to look up.
    table
        Indexed by drug.
    aliases
        Name to the name in the table, before anything else is tried.

    Returns
    -------
    Series indexed by name: name in the table, missing where there is none. Names match exactly, or without case, blanks and
    punctuation; a salt (``"x hydrochloride"``) matches the drug, and one of its common other names (``"paracetamol"``)
    matches ``"Acetaminophen"``.
    """
    known = {plain(n): str(n) for n in table.index[::-1]}
    salts = (
        r"(hydrochloride|hcl|sodium|sulfate|sulphate|maleate|citrate|phosphate|acetate|tartrate|mesylate|hydrobromide)$"
    )
    found: dict[str, Any] = {}
    for name in dict.fromkeys(map(str, names)):
        own = plain((aliases or {}).get(name, name))
        base = re.sub(salts, "", own)
        found[name] = next((known[n] for n in (own, base, *synonyms(own), *synonyms(base)) if n in known), np.nan)
    return pd.Series(found, dtype=object, name="match")


def describe_drugs(
    names: Iterable[str],
    table: pd.DataFrame | None = None,
    *,
    aliases: Mapping[str, str] | None = None,
    include_name: bool = True,
    mask_targets: bool = False,
    fields: Mapping[str, str] | None = None,
) -> pd.Series:
    """One sentence or two per drug, from a table such as the Drug Repurposing Hub's.

    Parameters
    ----------
    names
        Drugs.
    table
        Indexed by drug; by default :func:`pertura.datasets.repurposing_hub`.
    aliases
        See :func:`match_drugs`.
    include_name
        Whether the name is part of the text.
    mask_targets
        Leave out what names a target: the field of targets, gene symbols that occur in it anywhere, and words such as
        "inhibitor" or "receptor" with what they end. Needed where targets are to be recovered.
    fields
        Columns of the table and what to call them; by default mechanism, targets, indication and disease area.

    Returns
    -------
    Series of texts indexed by drug, empty where the table has none; ``attrs["unmatched"]`` lists those.
    """
    if table is None:
        from pertura.datasets import repurposing_hub

        table = repurposing_hub()
    fields = dict(_FIELDS if fields is None else fields)
    match = match_drugs(names, table, aliases=aliases)
    symbols = set()
    if mask_targets:
        fields.pop("target", None)
        if "target" in table:
            symbols = {s for cell in table["target"] for s in str(cell).split("|") if s}
    texts = {}
    for name, row in match.items():
        if not isinstance(row, str):
            texts[name] = ""
            continue
        values = table.loc[row] if table.index.is_unique else table.loc[[row]].iloc[0]
        parts = [
            f"{label}: {str(values[c]).replace('|', ', ')}" for c, label in fields.items() if c in table and values[c]
        ]
        text = ". ".join(parts)
        if mask_targets:
            text = _TARGET_WORDS.sub("", " ".join(w for w in text.split(" ") if w.strip(",.;").upper() not in symbols))
        texts[name] = (f"{name}. " if include_name and text.strip() else "") + text.strip()
    result = pd.Series(texts, dtype=object, name="text")
    result.attrs["unmatched"] = [n for n, t in texts.items() if not t]
    return result


def signatures(
    adata: AnnData,
    rows: NDArray,
    *,
    perturbation_key: str,
    control: str,
    layer: str | None = None,
    match_keys: Sequence[str] = (),
    exclude: Mapping[str, Any] | None = None,
    leave_out: str | None = None,
) -> pd.DataFrame | dict[str, pd.DataFrame]:
    """Differential-expression signatures of perturbations, from the named rows alone.

    Mean of a perturbation's cells minus the mean of matched controls. Values should be on a log scale.

    Parameters
    ----------
    adata
        Cells or profiles x genes.
    rows
        Row numbers, or a boolean per row, of cells that may be used: training rows, and never a cell that is to be predicted.
    perturbation_key, control
        Column of ``obs`` with the perturbation and the label of controls.
    layer
        `None` for ``X``.
    match_keys
        Columns of ``obs`` in which a treated cell and its controls agree (experiment, time, context).
    exclude
        Column to value: rows with it are not used.
    leave_out
        Column with the context: one table for each of its values in all of `adata`, made of the cells of all others, so that
        what is to be predicted in a context is described without it. Treated cells and controls then agree in this column too.

    Returns
    -------
    DataFrame, perturbations x genes; ``attrs["rows"]`` are the row numbers used, for :func:`drug_table` to check. With
    `leave_out` one per context; a perturbation that no other context has is not in its table (``attrs["only_here"]``).

    Raises
    ------
    ValueError
        If a column is missing, nothing has matched controls, or there is no other context.
    """
    if leave_out is not None:
        match = tuple(dict.fromkeys((*match_keys, leave_out)))
        options = {"perturbation_key": perturbation_key, "control": control, "layer": layer, "match_keys": match}
        return _by_context(adata, rows, leave_out, dict(exclude or {}), options)
    rows = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else np.asarray(rows)
    for column in (perturbation_key, *match_keys, *(exclude or {})):
        if column not in adata.obs:
            raise ValueError(f"`adata.obs` has no column {column!r} (columns: {list(adata.obs.columns)}).")
    for column, value in (exclude or {}).items():
        rows = rows[(adata.obs[column].to_numpy(object)[rows] != value)]
    obs = adata.obs.iloc[rows]
    label = obs[perturbation_key].astype(str).to_numpy()
    values = (adata.X if layer is None else adata.layers[layer])[rows]
    values = values.toarray() if hasattr(values, "toarray") else np.asarray(values)
    is_control = label == control
    group = obs.groupby(list(match_keys), observed=True).ngroup().to_numpy() if match_keys else np.zeros(len(obs), int)
    frame = pd.DataFrame(values, columns=adata.var_names.astype(str))
    base = frame[is_control].groupby(group[is_control]).mean()
    usable = ~is_control & np.isin(group, base.index)
    if not usable.any():
        raise ValueError("`rows`: no perturbed cell has a control that agrees with it in `match_keys`.")
    difference = frame[usable] - base.loc[group[usable]].to_numpy()
    result = difference.groupby(label[usable]).mean()
    result.index.name = "perturbation"
    result.attrs["rows"] = rows
    return result


def _by_context(
    adata: AnnData, rows: NDArray, column: str, exclude: dict[str, Any], options: dict[str, Any]
) -> dict[str, pd.DataFrame]:
    """Signatures for each context, of the cells of all others."""
    every = signatures(adata, rows, exclude=exclude, **options)
    contexts = list(dict.fromkeys(adata.obs[column].dropna().to_numpy(object)))
    used = set(adata.obs[column].to_numpy(object)[every.attrs["rows"]])
    if len(used) < 2:
        raise ValueError(
            f"`leave_out`: `obs[{column!r}]` has {len(used)} context among `rows`: nothing is left without it."
        )
    if column in exclude:
        raise ValueError(f"`exclude` and `leave_out` both name {column!r}. Give one of them.")
    result = {}
    for context in contexts:
        table = signatures(adata, rows, exclude={**exclude, column: context}, **options)
        table.attrs["only_here"] = [n for n in every.index if n not in table.index]
        result[str(context)] = table
    return result


def drug_table(
    names: Iterable[str],
    *,
    text: pd.Series | None = None,
    encoder: TextEncoder | Callable[[Sequence[str]], NDArray] | None = None,
    vectors: pd.DataFrame | None = None,
    signatures: pd.DataFrame | Mapping[str, pd.DataFrame] | None = None,
    held_out: NDArray | None = None,
) -> pd.DataFrame:
    """Features of drugs for ``perturbation_features_key``: put it into ``adata.uns``.

    Parameters
    ----------
    names
        Drugs: rows of the table, those to be predicted included.
    text
        Texts by drug (:func:`describe_drugs`), a Series or a table of one column.
    encoder
        Of the texts; by default :class:`TfidfEncoder`, fitted on these texts (which are no measurements).
    vectors
        Vectors of one's own, by drug.
    signatures
        Table of signatures by drug x gene, or several by name (:func:`signatures`, or other data).
    held_out
        Row numbers of cells that will be predicted: a signature made of one of them is refused.

    Returns
    -------
    DataFrame, drugs x features; what a drug lacks is 0. ``attrs["missing"]``: names without text and without signature.
    A warning names drugs of which nothing is known.

    Raises
    ------
    ValueError
        Where nothing is given, `text` is not one text per drug, no drug is found, or a signature was made of held-out rows.
    """
    names = list(dict.fromkeys(map(str, names)))
    parts, missing = [], {}
    if isinstance(text, pd.DataFrame) and text.shape[1] == 1:
        text = text.iloc[:, 0]
    if text is not None and not isinstance(text, (pd.Series, Mapping)):
        about = f" with the columns {list(text.columns)[:8]}" if isinstance(text, pd.DataFrame) else ""
        raise ValueError(
            f"`text` must be a Series of texts indexed by drug, got {type(text).__name__}{about}. "
            "`describe_drugs(names, table)` makes one of a table of drugs; vectors go to `vectors`."
        )
    for argument, given in (("text", text), ("vectors", vectors)):
        if given is not None and not set(names) & set(map(str, given.keys() if argument == "text" else given.index)):
            index = list(given.keys() if argument == "text" else given.index)[:5]
            raise ValueError(f"`{argument}`: none of `names` ({names[:5]}, …) is in its index ({index}, …).")
    if text is not None:
        text = pd.Series(text)
        texts = [str(t) for t in text.reindex(names).fillna("")]
        encoder = TfidfEncoder() if encoder is None else encoder
        found = encoder.fit(texts).transform(texts) if hasattr(encoder, "transform") else np.asarray(encoder(texts))
        parts.append(pd.DataFrame(found, index=names, columns=[f"text_{i}" for i in range(found.shape[1])]))
        missing["text"] = [n for n, t in zip(names, texts, strict=True) if not t.strip()]
    if vectors is not None:
        parts.append(vectors.reindex(names).fillna(0.0).add_prefix("vector_"))
    tables = signatures if isinstance(signatures, Mapping) else ({} if signatures is None else {"": signatures})
    for name, table in tables.items():
        used = table.attrs.get("rows")
        leaked = [] if held_out is None or used is None else np.intersect1d(used, held_out)
        if len(leaked):
            raise ValueError(
                f"`signatures`: {name or 'the signature'!r} was made with {len(leaked)} of the held-out rows. Make it from "
                "training rows."
            )
        prefix = f"{SIGNATURE}{name}:" if name else SIGNATURE
        missing[name or "signature"] = [n for n in names if n not in table.index]
        parts.append(table.reindex(names).fillna(0.0).add_prefix(prefix))
    if not parts:
        raise ValueError("Give `text`, `vectors` or `signatures`.")
    result = pd.concat(parts, axis=1).astype(np.float32)
    result.attrs["missing"] = missing
    empty = result.index[~result.to_numpy().any(1)]
    if len(empty) == len(result):
        raise ValueError("Nothing is known of any of `names`: every description is 0.")
    if len(empty):
        logger.warning(
            "%d of %d drugs have no description (all 0): %s%s.",
            len(empty),
            len(result),
            ", ".join(empty[:8]),
            ", …" if len(empty) > 8 else "",
        )
    return result
