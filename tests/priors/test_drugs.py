"""Texts, signatures, tables of drugs and networks of interactions."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from pertura import priors

HUB = pd.DataFrame(
    {
        "moa": ["HMGCR inhibitor", "adrenergic receptor agonist", ""],
        "target": ["HMGCR", "ADRB1|ADRB2", ""],
        "indication": ["hypercholesterolemia", "asthma", ""],
    },
    index=pd.Index(["atorvastatin", "iso-proterenol", "water"], name="perturbation"),
)


def test_names_match_without_case_blanks_and_salts():
    found = priors.match_drugs(
        ["Atorvastatin", "isoproterenol HCl", "ISO", "nothing"], HUB, aliases={"ISO": "iso-proterenol"}
    )
    assert found.tolist()[:3] == ["atorvastatin", "iso-proterenol", "iso-proterenol"]
    assert pd.isna(found["nothing"])


def test_names_match_other_names_of_the_drug():
    table = pd.DataFrame(index=["Acetaminophen", "salbutamol", "glyburide", "rapamycin"])
    found = priors.match_drugs(["paracetamol", "Albuterol sulfate", "Glibenclamide", "sirolimus", "STI571"], table)
    assert found.tolist()[:4] == ["Acetaminophen", "salbutamol", "glyburide", "rapamycin"]
    assert pd.isna(found["STI571"])


def test_what_is_no_text_is_refused(caplog):
    names = ["a", "b"]
    texts = pd.DataFrame({"text": ["one word", "two words"]}, index=names)
    pd.testing.assert_frame_equal(priors.drug_table(names, text=texts), priors.drug_table(names, text=texts["text"]))
    with pytest.raises(
        ValueError, match=r"`text` must be a Series .* got DataFrame with the columns \['moa', 'target'"
    ):
        priors.drug_table(names, text=HUB)
    with pytest.raises(ValueError, match="`text`: none of `names`"):
        priors.drug_table(["x", "y"], text=texts["text"])
    vectors = pd.DataFrame({"v": [1.0, 0.0]}, index=names)
    priors.drug_table([*names, "c"], vectors=vectors)
    assert "2 of 3 drugs have no description (all 0): b, c." in caplog.text
    with pytest.raises(ValueError, match="every description is 0"):
        priors.drug_table(names, vectors=vectors * 0)


def test_texts_and_what_masking_leaves():
    found = priors.describe_drugs(["Atorvastatin", "nothing"], HUB)
    assert "HMGCR inhibitor" in found["Atorvastatin"] and found["nothing"] == ""
    assert found.attrs["unmatched"] == ["nothing"]
    masked = priors.describe_drugs(["Atorvastatin", "iso-proterenol"], HUB, mask_targets=True)
    joined = " ".join(masked)
    assert not any(w in joined for w in ("HMGCR", "ADRB1", "inhibitor", "agonist", "receptor"))
    assert "asthma" in joined


def test_text_vectors_do_not_depend_on_the_run_and_missing_is_zero():
    texts = ["lipid lowering", "lipid statin", "nerve channel", ""]
    first, second = (priors.TfidfEncoder(2).fit(texts).transform(texts) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not first[3].any()
    assert first[0] @ first[1] > first[0] @ first[2]
    with pytest.raises(ValueError, match="`texts`"):
        priors.TfidfEncoder().fit(["", "one"])


def profiles() -> AnnData:
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {"drug": ["control"] * 4 + ["a"] * 4 + ["b"] * 4, "line": ["x", "x", "y", "y"] * 3},
        index=[f"p{i}" for i in range(12)],
    )
    return AnnData(rng.normal(size=(12, 3)), obs=obs, var=pd.DataFrame(index=["g1", "g2", "g3"]))


SETTINGS = {"perturbation_key": "drug", "control": "control"}


def test_signatures_never_see_other_rows():
    adata = profiles()
    rows = np.arange(10)  # the last two rows of b are held out
    found = priors.signatures(adata, rows, match_keys=["line"], **SETTINGS)
    expected = adata.X[8:10].mean(0) - adata.X[:2].mean(0)
    np.testing.assert_allclose(found.loc["b"], expected)
    changed = adata.copy()
    changed.X[10:] = 1e6
    pd.testing.assert_frame_equal(found, priors.signatures(changed, rows, match_keys=["line"], **SETTINGS))
    left = priors.signatures(adata, np.arange(12), match_keys=["line"], exclude={"line": "x"}, **SETTINGS)
    np.testing.assert_allclose(left.loc["a"], adata.X[6:8].mean(0) - adata.X[2:4].mean(0))


def test_a_planted_leak_is_caught():
    adata = profiles()
    held_out = np.arange(10, 12)
    clean = priors.signatures(adata, np.arange(10), **SETTINGS)
    leaky = priors.signatures(adata, np.arange(12), **SETTINGS)
    table = priors.drug_table(["a", "b", "c"], signatures=clean, held_out=held_out)
    assert table.columns.tolist() == [f"signature:g{i}" for i in (1, 2, 3)]
    assert not table.loc["c"].any() and table.attrs["missing"]["signature"] == ["c"]
    with pytest.raises(ValueError, match="2 of the held-out rows"):
        priors.drug_table(["a", "b"], signatures=leaky, held_out=held_out)
    with pytest.raises(ValueError, match="`text`, `vectors` or `signatures`"):
        priors.drug_table(["a"])


def test_signatures_that_leave_a_context_out_do_not_see_a_planted_leak():
    rng = np.random.default_rng(1)
    lines, drugs = ["x", "y", "z"], ["control", "a", "b"]
    obs = pd.DataFrame([(d, c) for c in lines for d in drugs for _ in range(4)], columns=["drug", "line"])
    obs.index = obs.index.astype(str)
    adata = AnnData(rng.normal(size=(36, 3)), obs=obs, var=pd.DataFrame(index=["g1", "g2", "g3"]))
    adata.X += 5.0 * (obs["line"].to_numpy() == "y")[:, None]  # contexts differ: controls of another one would show
    in_x = (obs["line"] == "x").to_numpy()
    leak = in_x & (obs["drug"] == "a").to_numpy()
    adata.X[leak, 0] += 100.0  # what is to be predicted in x
    found = priors.signatures(adata, np.arange(36), leave_out="line", **SETTINGS)
    assert list(found) == lines
    assert abs(found["x"].loc["a", "g1"]) < 3 and found["y"].loc["a", "g1"] > 40
    assert found["y"].abs().drop(columns="g1").to_numpy().max() < 3
    changed = adata.copy()
    changed.X[in_x] = rng.normal(size=(12, 3))
    again = priors.signatures(changed, np.arange(36), leave_out="line", **SETTINGS)
    pd.testing.assert_frame_equal(found["x"], again["x"])
    assert not found["y"].equals(again["y"])
    # the table of x describes x; that of another context would leak
    held_out = np.flatnonzero(in_x)
    assert len(priors.drug_table(["a", "b"], signatures=found["x"], held_out=held_out)) == 2
    with pytest.raises(ValueError, match="12 of the held-out rows"):
        priors.drug_table(["a", "b"], signatures=found["y"], held_out=held_out)
    # training rows without x at all: its table is made all the same, of the others
    rest = priors.signatures(adata, ~in_x & (obs["drug"] != "b").to_numpy(), leave_out="line", **SETTINGS)
    pd.testing.assert_frame_equal(rest["x"].loc[["a"]], found["x"].loc[["a"]])
    assert "b" not in rest["x"].index


def test_a_drug_of_one_context_alone_has_no_signature_there():
    adata = profiles()
    adata.obs.loc[adata.obs_names[8:10], "drug"] = "a"  # b is in y alone
    found = priors.signatures(adata, np.arange(12), leave_out="line", **SETTINGS)
    assert found["y"].attrs["only_here"] == ["b"] and "b" in found["x"].index
    with pytest.raises(ValueError, match="`leave_out`"):
        priors.signatures(adata, [0, 1, 4, 5], leave_out="line", **SETTINGS)


def test_network_of_a_table():
    adata = profiles()
    edges = pd.DataFrame(
        {"source": ["g1", "g2", "g2", "zz"], "target": ["g2", "g1", "g2", "g1"], "weight": [1.0, 2, 9, 1]}
    )
    priors.ppi_network(adata, edges)
    found = adata.varp["ppi"].toarray()
    assert found[0, 1] == found[1, 0] == 2 and found.sum() == 4
    assert adata.uns["ppi"]["n_pairs"] == 1 and adata.uns["ppi"]["n_genes_without"] == 1
    with pytest.raises(ValueError, match="overwrite"):
        priors.ppi_network(adata, edges)
    with pytest.raises(ValueError, match="none of the"):
        priors.ppi_network(adata, edges.replace({"g1": "q", "g2": "r"}), key_added="other")
