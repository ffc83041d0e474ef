import numpy as np
import pandas as pd
import pytest

from pertura.data import _pairs as pairs
from pertura.data._pairs import embed, explicit_coupling, random_coupling, strata, transport_coupling


def _obs(n=120, seed=0):
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame({"context": rng.choice(list("abc"), n), "batch": rng.choice(list("xy"), n)})
    return obs, rng.random(n) < 0.4


def test_random_partners_are_controls_of_the_stratum_and_uniform():
    obs, control = _obs()
    rows = np.arange(1000, 1000 + len(obs))
    where = strata(obs, control, ["context"])
    coupling = random_coupling(rows, control, where)
    assert set(coupling.treated) == set(rows[~control])
    rng = np.random.default_rng(0)
    drawn = np.stack([coupling.draw(rng) for _ in range(4000)])
    assert control[drawn - 1000].all()
    same = obs["context"].to_numpy()[drawn - 1000] == obs["context"].to_numpy()[coupling.treated - 1000]
    assert same.all()
    pool = rows[control & (obs["context"] == obs["context"][coupling.treated[0] - 1000]).to_numpy()]
    share = pd.Series(drawn[:, 0]).value_counts(normalize=True).reindex(pool, fill_value=0)
    np.testing.assert_allclose(share, 1 / len(pool), atol=4 * np.sqrt(1 / len(pool) / 4000))


def test_strata_prefer_the_batch_and_fall_back_to_the_context():
    obs = pd.DataFrame({"context": ["a"] * 5 + ["b"], "batch": ["x", "x", "y", "y", "z", "x"]})
    control = np.array([True, False, True, False, False, False])
    where = strata(obs, control, ["context", "batch"])
    assert where.wanted[0] == where.wanted[1] != where.wanted[2] == where.wanted[3]
    assert where.wanted[5] == -1  # no control in context b
    assert set(where.members(where.wanted[4])) == {0, 2}  # batch z has none: those of context a
    coupling = random_coupling(np.arange(6), control, where)
    partners = dict(zip(coupling.treated, coupling.draw(np.random.default_rng(0)), strict=True))
    assert partners[1] == 0 and partners[3] == 2


def test_a_batch_without_controls_borrows_those_of_its_context():
    obs = pd.DataFrame({"context": ["a"] * 3, "batch": ["x", "x", "z"]})
    control = np.array([True, False, False])
    coupling = random_coupling(np.arange(3), control, strata(obs, control, ["context", "batch"]))
    assert 2 in coupling.treated


def test_explicit_pairs():
    pair = np.array(["p", "q", "p", "q", None, "r"], dtype=object)
    control = np.array([True, True, False, False, False, False])
    coupling = explicit_coupling(np.arange(6), control, pair)
    assert dict(zip(coupling.treated, coupling.draw(np.random.default_rng(0)), strict=True)) == {2: 0, 3: 1}


def test_transport_finds_the_planted_pairs():
    """Treated cells are shifted copies of controls: the coupling gives each its own original."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(80, 5)).astype(np.float32)
    order = rng.permutation(80)
    embedding = np.concatenate([base, base[order] + np.float32(3.0)])
    control = np.arange(160) < 80
    where = strata(pd.DataFrame({"context": ["a"] * 160}), control, ["context"])
    coupling = transport_coupling(np.arange(160), control, where, (~control).astype(int), embedding, rng)
    np.testing.assert_array_equal(coupling.draw(rng), order[coupling.treated - 80])


def test_transport_draws_in_proportion_to_the_plan_and_blocks_cover_all_cells(monkeypatch):
    monkeypatch.setattr(pairs, "_MAX_EXACT", 16)
    monkeypatch.setattr(pairs, "_BLOCK", 8)
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(130, 3)).astype(np.float32)
    control = np.arange(130) < 50
    stratum = np.where(np.arange(130) % 2 == 0, 0, 1)
    group = np.where(control, -1, rng.integers(0, 2, 130))
    where = strata(pd.DataFrame({"context": stratum}), control, ["context"])
    coupling = transport_coupling(np.arange(130), control, where, group, embedding, rng)
    assert set(coupling.treated) == set(np.flatnonzero(~control))
    drawn = np.stack([coupling.draw(rng) for _ in range(2000)])
    assert control[drawn].all()
    assert (stratum[drawn] == stratum[coupling.treated]).all()
    first = coupling.partners[: coupling.count[0]]
    weights = np.diff(np.concatenate([[0.0], coupling.cumulative[: coupling.count[0]]]))
    share = pd.Series(drawn[:, 0]).value_counts(normalize=True).reindex(first, fill_value=0).to_numpy()
    np.testing.assert_allclose(share, weights, atol=0.05)
    assert weights.sum() == pytest.approx(1.0)


def test_blocks_of_many_cells_are_small_and_partners_nearer_than_random_ones():
    rng = np.random.default_rng(0)
    treated, control = (rng.normal(size=(n, 4)).astype(np.float32) for n in (300, 700))
    blocks = list(pairs._blocks(treated, control))
    assert all(max(len(t), len(c)) <= 64 for t, c in blocks)
    for which, n in ((0, 300), (1, 700)):
        np.testing.assert_array_equal(np.sort(np.concatenate([b[which] for b in blocks])), np.arange(n))
    # equal shares of both sides: no control is used much more than another
    assert all(abs(len(c) / len(t) - 700 / 300) < 0.5 for t, c in blocks)
    embedding = np.concatenate([control, treated])
    is_control = np.arange(1000) < 700
    where = strata(pd.DataFrame({"context": ["a"] * 1000}), is_control, ["context"])
    coupling = transport_coupling(np.arange(1000), is_control, where, (~is_control).astype(int), embedding, rng)
    distance = np.square(embedding[coupling.treated] - embedding[coupling.draw(rng)]).sum(1)
    assert distance.mean() < 0.5 * 8  # 8 between random cells


def test_a_group_far_smaller_than_its_controls_uses_some_of_them():
    rng = np.random.default_rng(0)
    is_control = np.arange(1010) < 1000
    embedding = rng.normal(size=(1010, 3)).astype(np.float32)
    where = strata(pd.DataFrame({"context": ["a"] * 1010}), is_control, ["context"])
    coupling = transport_coupling(np.arange(1010), is_control, where, (~is_control).astype(int), embedding, rng)
    assert len(np.unique(coupling.partners)) == 128
    assert len(coupling.treated) == 10


@pytest.mark.parametrize("counts", [True, False])
def test_embedding_of_sparse_and_dense_agree(counts):
    from scipy import sparse

    x = np.random.default_rng(0).poisson(1.0, size=(60, 20)).astype(np.float32)
    dense, axes = embed(x, counts, 5, return_basis=True)
    sparse_embedding = embed(sparse.csr_matrix(x), counts, 5)
    np.testing.assert_allclose(np.abs(dense), np.abs(sparse_embedding), atol=1e-2)
    assert axes.shape == (5, 20)
