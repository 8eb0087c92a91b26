"""Pretrained gene encoders: parity with upstream's numbers, chance, batches, names of genes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from scipy import sparse

from st_align.encoders import _layout, _ragged
from st_align.encoders.base import FrozenEntry, find
from st_align.encoders.gene_vocabulary import GeneVocabulary
from st_align.encoders.scfoundation import ScFoundation
from st_align.encoders.scgpt import ScGpt, bin_values
from st_align.errors import ModelError
from st_align.expression import Genes
from st_align.features import slide_features
from toys import toy_prepared

CPU = torch.device("cpu")
SCGPT, SCFOUNDATION = 5e-5, 3e-5
GENE_INDEX = "OS_scRNA_gene_index.19264.tsv"


def names(*symbols, ensembl=None) -> Genes:
    ids = [""] * len(symbols) if ensembl is None else ensembl
    return Genes(symbols=np.array(symbols, np.str_), ensembl=np.array(ids, np.str_))


def encode(encoder, counts, genes, seed=0) -> torch.Tensor:
    counts = sparse.csr_array(counts)
    rng = np.random.default_rng(seed)
    encoded = encoder.encode_genes(counts, genes, np.asarray(counts.sum(axis=1)), rng)
    assert encoded.tokens.shape == (counts.shape[0], encoder.n_tokens, encoder.dim)
    assert encoded.tokens.dtype == encoded.pooled.dtype == torch.float32
    assert torch.equal(encoded.tokens[:, 0], encoded.pooled)
    return encoded.pooled


@pytest.fixture(autouse=True)
def _no_guesses(monkeypatch):
    """Which encoder a file is of is another module's matter, and takes seconds to say."""
    monkeypatch.setattr(_layout, "_recognised", lambda tensors: [])


@pytest.fixture(scope="module")
def fill(golden):
    """Stand-in tensors of a golden layout, as {key: tensor}."""
    spec = importlib.util.spec_from_file_location("fill", golden / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def of(folder, wanted):
        layout = json.loads((golden / folder / "state_dict_layout.json").read_text())
        layout = {key: shape for key, shape in layout.items() if wanted(key)}
        return {k: torch.from_numpy(v) for k, v in module.fill_state_dict(layout).items()}

    return of


# scGPT as published: 12 layers, weights filled as the fixture says


@pytest.fixture(scope="module")
def scgpt(golden, fill, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scgpt")
    torch.save(fill("scgpt", lambda key: True), folder / "best_model.pt")
    for name in ("args.json", "vocab.json"):
        shutil.copy(golden / "scgpt" / name, folder)
    yield ScGpt(folder, device=CPU)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def given(golden):
    return np.load(golden / "scgpt" / "inputs.npz")


@pytest.fixture(scope="module")
def wanted(golden):
    return np.load(golden / "scgpt" / "outputs.npz")


def test_scgpt_agrees_with_upstream(scgpt, given, wanted):
    ids, values = given["forward.genes"], given["forward.values"]
    sizes = [int(n) for n in (ids != 60694).sum(axis=1)]
    kept = np.concatenate([np.arange(n) + row * ids.shape[1] for row, n in enumerate(sizes)])
    tokens = torch.from_numpy(ids.ravel()[kept]).long(), torch.from_numpy(values.ravel()[kept])
    cls = scgpt.network.cls(*tokens, sizes).numpy()
    assert np.abs(cls - wanted["forward.cls"]).max() < SCGPT
    valid = wanted["forward.valid"]
    pooled = cls / np.linalg.norm(cls, axis=1, keepdims=True) * valid[:, None]
    assert np.abs(pooled - wanted["forward.embedding"]).max() < SCGPT
    encoded = scgpt.network.value_tokens(torch.from_numpy(given["value.given"])).numpy()
    assert np.abs(encoded - wanted["value.encoded"]).max() < SCGPT


def test_scgpt_reads_the_tokens_that_upstream_reads(scgpt, given, wanted):
    genes = names(*given["counts.columns"])
    match = scgpt.vocabulary.match(genes)
    found = match.select(sparse.csr_array(given["counts.counts"]))
    for row in range(5):
        cut = slice(*found.indptr[row : row + 2])
        ids = wanted[f"counts.genes{row}"]
        order = np.argsort(ids)
        np.testing.assert_array_equal(match.tokens[found.indices[cut]], ids[order])
        if len(ids):
            uniform = given[f"counts.uniform{row}"][order]
            bins = bin_values(found.data[cut].astype(np.float32), uniform, 51)
            np.testing.assert_array_equal(bins, wanted[f"counts.bins{row}"][order])


def test_scgpt_end_to_end(scgpt, given, wanted):
    """The bins are drawn anew, so the embedding is near the recorded one and not it."""
    counts, genes = given["counts.counts"], names(*given["counts.columns"])
    pooled = encode(scgpt, counts, genes).numpy()
    assert not pooled[3:].any()  # nothing expressed, and unknown genes only
    recorded = wanted["forward.embedding"][:3]
    assert np.abs(np.linalg.norm(pooled[:3], axis=1) - 1).max() < 1e-6
    assert ((pooled[:3] * recorded).sum(axis=1) > 0.999).all()
    assert scgpt.dim == 512
    assert len(scgpt.fingerprint) == 12


def test_bins_agree_with_upstream(given, wanted):
    rows = [key.removesuffix(".edges") for key in wanted.files if key.endswith(".edges")]
    assert len(rows) == 9
    for row in rows:
        values, uniform = given[f"{row}.values"], given[f"{row}.uniform"]
        np.testing.assert_array_equal(bin_values(values, uniform, 51), wanted[f"{row}.bins"])
        low, high = (bin_values(values, np.full(len(values), u), 51) for u in (1e-9, 1 - 1e-9))
        ends = np.sort([low, high], axis=0)
        np.testing.assert_array_equal(ends, [wanted[f"{row}.low"], wanted[f"{row}.high"]])


# a small scGPT: two layers of width 16 over 40 genes

ARGS = {
    "embsize": 16,
    "nheads": 2,
    "d_hid": 24,
    "nlayers": 2,
    "n_bins": 51,
    "max_seq_len": 21,
    "pad_value": -2,
    "input_emb_style": "continuous",
    "dropout": 0.2,
}
SYMBOLS = [f"GENE{i}" for i in range(40)]


def small_tensors(rows=43) -> dict[str, torch.Tensor]:
    random, dim, hidden = torch.Generator().manual_seed(0), ARGS["embsize"], ARGS["d_hid"]

    def block(prefix, *shape):
        return {
            f"{prefix}.weight": torch.randn(shape, generator=random) / shape[-1] ** 0.5,
            f"{prefix}.bias": 0.1 * torch.randn(shape[0], generator=random),
        }

    table = block("encoder.embedding", rows, dim)
    tensors = {"encoder.embedding.weight": table["encoder.embedding.weight"]}
    tensors |= block("encoder.enc_norm", dim) | block("value_encoder.linear1", dim, 1)
    tensors |= block("value_encoder.linear2", dim, dim) | block("value_encoder.norm", dim)
    for layer in range(ARGS["nlayers"]):
        at = f"transformer_encoder.layers.{layer}"
        tensors |= block(f"{at}.self_attn.Wqkv", 3 * dim, dim)
        tensors |= block(f"{at}.self_attn.out_proj", dim, dim)
        tensors |= block(f"{at}.linear1", hidden, dim) | block(f"{at}.linear2", dim, hidden)
        tensors |= block(f"{at}.norm1", dim) | block(f"{at}.norm2", dim)
    return tensors | block("mvc_decoder.W", dim, dim) | {"flag_encoder.weight": torch.ones(2, dim)}


def save_small(folder, tensors=None, args=None, vocab=None):
    folder.mkdir(exist_ok=True)
    special = {"<pad>": 40, "<cls>": 41, "<eoc>": 42}
    vocab = {name: i for i, name in enumerate(SYMBOLS)} | special if vocab is None else vocab
    (folder / "args.json").write_text(json.dumps(ARGS if args is None else args))
    (folder / "vocab.json").write_text(json.dumps(vocab))
    torch.save(small_tensors() if tensors is None else tensors, folder / "best_model.pt")
    return folder


@pytest.fixture
def small(tmp_path):
    return ScGpt(save_small(tmp_path / "scgpt"), device=CPU)


@pytest.fixture
def counts(rng):
    """Twelve spots of 0 to 40 expressed genes; spot 3 expresses none."""
    counts = rng.poisson(3, (12, 40)) * (rng.random((12, 40)) < rng.random((12, 1)))
    counts[3] = 0
    return counts


def test_batch_order_and_neighbours_do_not_matter(small, counts, rng, monkeypatch):
    genes, order = names(*SYMBOLS), rng.permutation(12)
    whole = encode(small, counts, genes)
    monkeypatch.setitem(_ragged._TOKENS_AT_ONCE, "cpu", 30)
    torch.testing.assert_close(encode(small, counts[order], genes), whole[order])
    for row in range(12):
        torch.testing.assert_close(encode(small, counts[[row]], genes), whole[[row]])


def test_order_of_the_genes_does_not_matter(small, counts, rng):
    order = rng.permutation(40)
    whole = encode(small, counts, names(*SYMBOLS))
    torch.testing.assert_close(
        encode(small, counts[:, order], names(*np.take(SYMBOLS, order))), whole
    )


def test_chance_is_seeded(small, counts):
    genes = names(*SYMBOLS)
    before = torch.get_rng_state()
    one, same, other = (encode(small, counts, genes, seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=1e-3)
    assert torch.equal(torch.get_rng_state(), before)


def test_spots_draw_from_generators_of_their_own(small):
    ties = np.ones(20, np.float32)
    one, other = (small.token_set(ids, ties).values for ids in (np.arange(20), np.arange(20, 40)))
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(one, small.token_set(np.arange(20), ties).values)


def test_spots_without_known_genes_are_zero(small, counts):
    unknown = [f"NOT{i}" for i in range(39)]
    pooled = encode(small, counts, names("GENE0", *unknown))
    expressed = counts[:, 0] > 0
    assert 0 < expressed.sum() < 12
    assert not pooled[~expressed].any()
    torch.testing.assert_close(pooled[expressed].norm(dim=1), torch.ones(int(expressed.sum())))
    assert not encode(small, np.zeros((2, 40)), names(*SYMBOLS)).any()


def test_too_many_genes_are_sampled(small):
    ids, counts = np.arange(40), np.arange(1, 41, dtype=np.float32)
    few, many = small.token_set(ids[:20], counts[:20]), small.token_set(ids, counts)
    np.testing.assert_array_equal(few.ids, [41, *range(20)])
    assert len(many) == ARGS["max_seq_len"]
    assert many.ids[0] == 41
    assert many.values[0] == -2
    assert len(set(many.ids.tolist())) == len(many)
    bins = bin_values(counts, np.zeros(40), 51)  # of all 40, before sampling: no ties here
    np.testing.assert_array_equal(many.values[1:], bins[many.ids[1:]])
    assert set(small.token_set(ids, counts, salt=1).ids) != set(many.ids)


def test_through_a_slide(small, rng):
    slide = toy_prepared(rng, image=False)
    for view in ("spot", "niche"):
        found = [
            slide_features(slide, small, view, niche_spec="lattice", batch=batch).pooled
            for batch in (64, 5)
        ]
        np.testing.assert_allclose(*found, atol=1e-3)
        assert found[0].shape == (36, 16)
        assert found[0].any(axis=1).all()


@pytest.mark.parametrize("attention", ["Wqkv.", "_impl.Wqkv.", "in_proj_"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_form_of_the_checkpoint(small, counts, tmp_path, attention, prefix):
    tensors = {
        prefix + name.replace("Wqkv.", attention): tensor
        for name, tensor in small_tensors().items()
    }
    other = ScGpt(save_small(tmp_path / "other", tensors) / "best_model.pt", device=CPU)
    genes = names(*SYMBOLS)
    assert torch.equal(encode(other, counts, genes), encode(small, counts, genes))


def test_fingerprint_follows_all_that_matters(small, tmp_path):
    vocab = json.loads((tmp_path / "scgpt" / "vocab.json").read_text())
    swapped = vocab | {"GENE0": 1, "GENE1": 0}
    other = [
        ScGpt(save_small(tmp_path / "a", vocab=swapped)),
        ScGpt(save_small(tmp_path / "b", args=ARGS | {"max_seq_len": 20})),
        ScGpt(save_small(tmp_path / "c", small_tensors(rows=50))),
        ScGpt(save_small(tmp_path / "d", args=ARGS | {"dropout": 0.5})),
    ]
    assert len({small.fingerprint, *(e.fingerprint for e in other)}) == 4
    assert other[3].fingerprint == small.fingerprint


class Payload:
    def __reduce__(self):
        return (print, ("ran",))


def damage(folder, kind):
    path = folder / "best_model.pt"
    if kind in ("args.json", "vocab.json", "best_model.pt"):
        (folder / kind).unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Payload()))
    elif kind == "args":
        (folder / "args.json").write_text("<html>")
    elif kind == "list":
        (folder / "vocab.json").write_text("[1]")
    else:
        tensors, args, vocab = BROKEN[kind]
        save_small(folder, tensors(small_tensors()), ARGS | args, vocab)


def without(name):
    return lambda tensors: {k: t for k, t in tensors.items() if k != name}


BROKEN = {
    "missing": (without("value_encoder.norm.bias"), {}, None),
    "unknown": (lambda tensors: tensors | {"bn.weight": torch.ones(16)}, {}, None),
    "shape": (lambda tensors: tensors, {"d_hid": 25}, None),
    "deeper": (lambda tensors: tensors, {"nlayers": 3}, None),
    "rows": (lambda tensors: tensors, {}, {"<cls>": 41, "GENE0": 60_000}),
    "no cls": (lambda tensors: tensors, {}, {"GENE0": 0}),
    "words": (lambda tensors: tensors, {}, {"<cls>": "41"}),
    "style": (lambda tensors: tensors, {"input_emb_style": "category"}, None),
}
SAYS = {
    "args.json": "args.json of scGPT is missing",
    "vocab.json": "vocab.json of scGPT is missing",
    "best_model.pt": "best_model.pt of scGPT is missing",
    "truncated": "best_model.pt",
    "pickle": "pickle",
    "args": "args.json is no JSON file",
    "list": "vocab.json holds no JSON object",
    "missing": "value_encoder.norm.bias",
    "unknown": "bn.weight",
    "shape": "linear1.weight",
    "deeper": "layers.2",
    "rows": "different checkpoints",
    "no cls": "<cls>",
    "words": "is no vocabulary",
    "style": "category",
}


@pytest.mark.parametrize("kind", SAYS)
def test_unusable_scgpt_folders_are_one_clear_error(kind, tmp_path, capsys):
    folder = save_small(tmp_path / "scgpt")
    damage(folder, kind)
    with pytest.raises(ModelError, match=SAYS[kind]):
        ScGpt(folder)
    assert "ran" not in capsys.readouterr().out


def test_args_without_a_key(tmp_path):
    args = {key: value for key, value in ARGS.items() if key != "nheads"}
    with pytest.raises(ModelError, match="lacks nheads"):
        ScGpt(save_small(tmp_path / "scgpt", args=args))


# scFoundation as published: 12 layers; what is not read is left out but for a few tensors

NOT_READ = ("decoder.norm.", "decoder_embed.", "norm.", "to_final.")


def write_index(folder, symbols):
    lines = [f"{symbol}\t{place}" for place, symbol in enumerate(symbols)]
    (folder / GENE_INDEX).write_text("\n".join(["gene_name\tindex", *lines]) + "\n")


@pytest.fixture(scope="module")
def places(golden):
    return json.loads((golden / "scfoundation" / "genes.json").read_text())


@pytest.fixture(scope="module")
def scfoundation(golden, fill, places, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scfoundation")
    tensors = fill("scfoundation", lambda k: not k.startswith("decoder.") or k.startswith(NOT_READ))
    config = json.loads((golden / "scfoundation" / "config.json").read_text())
    torch.save({"cell": part(tensors, config)}, folder / "models.ckpt")
    symbol_at = {place: symbol for symbol, place in places.items()}
    write_index(folder, [symbol_at.get(place, f"UNUSED{place}") for place in range(19264)])
    yield ScFoundation(folder, device=CPU)
    shutil.rmtree(folder)


def part(tensors, config):
    """One of the three networks in `models.ckpt`."""
    return {
        "config": {"model": "mae_autobin", "model_config": {"mae_autobin": config}},
        "state_dict": {f"model.{name}": tensor for name, tensor in tensors.items()},
    }


def test_scfoundation_agrees_with_upstream(scfoundation, golden, places):
    given, wanted = (np.load(golden / "scfoundation" / f"{n}.npz") for n in ("inputs", "outputs"))
    lengths, symbols = given["lengths"], list(places)
    column = {place: column for column, place in enumerate(places.values())}
    at = np.repeat(np.arange(6), lengths), [column[place] for place in given["genes"]]
    counts = sparse.csr_array((given["counts"], at), shape=(6, len(symbols)))
    pooled = encode(scfoundation, counts, names(*symbols)).numpy()
    assert np.abs(pooled - wanted["t4.all"]).max() < SCFOUNDATION

    parts = zip(
        *(np.split(given[k], np.cumsum(lengths)[:-1]) for k in ("genes", "counts")), strict=True
    )
    sets = [scfoundation.token_set(genes.astype(np.int64), n) for genes, n in parts]
    np.testing.assert_array_equal(np.concatenate([s.ids for s in sets]), wanted["positions"])
    np.testing.assert_array_equal(np.concatenate([s.values for s in sets]), wanted["t4.values"])

    values = torch.from_numpy(given["value.given"][:13])  # the last two stand for mask and fill
    tokens = scfoundation.network.value_tokens(values).numpy()
    assert np.abs(tokens - wanted["value.token"][:13]).max() < SCFOUNDATION
    assert scfoundation.dim == 3072


# a small scFoundation: two layers of width 64 over 40 genes


def small_network() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)

    def block(prefix, *shape):
        return {
            f"{prefix}.weight": torch.randn(shape, generator=random) / shape[-1] ** 0.5,
            f"{prefix}.bias": 0.1 * torch.randn(shape[0], generator=random),
        }

    tensors = block("token_emb.mlp", 10, 1) | block("token_emb.mlp2", 10, 10)
    for name, rows in (("token_emb.emb", 10), ("token_emb.emb_mask", 1), ("pos_emb", 43)):
        tensors[f"{name}.weight"] = torch.randn((rows, 64), generator=random)
    for layer in range(2):
        at = f"encoder.transformer_encoder.{layer}"
        projection = block(f"{at}.self_attn.in_proj", 192, 64)
        tensors |= {k.replace("proj.", "proj_"): tensor for k, tensor in projection.items()}
        tensors |= block(f"{at}.self_attn.out_proj", 64, 64) | block(f"{at}.norm1", 64)
        tensors |= block(f"{at}.linear1", 32, 64) | block(f"{at}.linear2", 64, 32)
        tensors |= block(f"{at}.norm2", 64)
    return tensors | block("encoder.norm", 64) | block("to_final", 1, 8)


CONFIG = {"bin_alpha": 0.5, "encoder": {"norm_first": False}}


def save_network(folder, held=None, symbols=SYMBOLS):
    folder.mkdir(exist_ok=True)
    torch.save(
        {"cell": part(small_network(), CONFIG)} if held is None else held, folder / "models.ckpt"
    )
    write_index(folder, symbols)
    return folder


@pytest.fixture
def network(tmp_path):
    return ScFoundation(save_network(tmp_path / "scfoundation"), device=CPU)


def test_scfoundation_does_not_depend_on_the_batch(network, counts, rng, monkeypatch):
    genes, order = names(*SYMBOLS), rng.permutation(12)
    whole = encode(network, counts, genes, seed=1)
    monkeypatch.setitem(_ragged._TOKENS_AT_ONCE, "cpu", 30)
    torch.testing.assert_close(encode(network, counts[order], genes, seed=2), whole[order])
    for row in range(12):
        torch.testing.assert_close(encode(network, counts[[row]], genes), whole[[row]])


def test_spots_that_scfoundation_cannot_read_are_zero(network):
    counts = np.zeros((4, 40), np.int64)
    counts[1, 5] = 1  # log10 of one molecule is zero, and zeros are no tokens
    counts[2, 5] = 2
    counts[3, [5, 6]] = 1
    pooled = encode(network, counts, names(*SYMBOLS))
    assert pooled.any(dim=1).tolist() == [False, False, True, True]


def test_a_plain_state_dict_of_the_cell_encoder(network, counts, tmp_path):
    plain = ScFoundation(save_network(tmp_path / "plain", small_network()), device=CPU)
    config = {"bin_alpha": 1.0, "encoder": {"norm_first": False}}
    same = save_network(tmp_path / "same", {"cell": part(small_network(), config)})
    genes = names(*SYMBOLS)
    found = encode(plain, counts, genes)
    assert torch.equal(encode(ScFoundation(same / "models.ckpt", device=CPU), counts, genes), found)
    assert not torch.allclose(encode(network, counts, genes), found)  # its bin_alpha is 0.5


def broken_network(kind):
    tensors = small_network()
    if kind == "gene only":
        return {"gene": part(tensors, CONFIG)}
    if kind == "pre-norm":
        return {"cell": part(tensors, CONFIG | {"encoder": {"norm_first": True}})}
    if kind == "performer":
        held = part(tensors, CONFIG)
        held["config"]["model"] = "performer_gau"
        return {"cell": held}
    if kind == "scgpt":
        return {"cell": part(small_tensors(), CONFIG)}
    if kind == "unknown":
        return {"cell": part(tensors | {"extra.weight": torch.ones(1)}, CONFIG)}
    del tensors["encoder.transformer_encoder.1.norm2.bias"]
    return {"cell": part(tensors, CONFIG)}


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("gene only", "is no checkpoint of scFoundation"),
        ("pre-norm", "norm_first True"),
        ("performer", "performer_gau"),
        ("scgpt", "another network"),
        ("unknown", "extra.weight"),
        ("missing", "encoder.transformer_encoder.1.norm2.bias"),
    ],
)
def test_unusable_scfoundation_files_are_one_clear_error(kind, says, tmp_path):
    folder = save_network(tmp_path / "scfoundation", broken_network(kind))
    with pytest.raises(ModelError, match=says):
        ScFoundation(folder)


def test_the_gene_index_lies_beside_the_weights(tmp_path):
    folder = save_network(tmp_path / "scfoundation", symbols=SYMBOLS[:39])
    with pytest.raises(ModelError, match="does not fit the weights"):
        ScFoundation(folder)
    (folder / GENE_INDEX).write_text("name\nGENE0\n")
    with pytest.raises(ModelError, match="40 genes in a column gene_name"):
        ScFoundation(folder)
    (folder / GENE_INDEX).unlink()
    with pytest.raises(ModelError, match=GENE_INDEX):
        ScFoundation(folder)
    with pytest.raises(ModelError, match=r"models\.ckpt"):
        ScFoundation(tmp_path)


# names of genes


def test_three_routes_to_a_gene():
    vocabulary = GeneVocabulary(
        {"SNAP25": 0, "ENSG00000283675.1": 1, "U6_ENSG00000283666": 2, "MARCH1": 3, "TMEM41B": 4}
    )
    genes = names(
        "MARCHF1",  # MARCH1 until 2020
        "SNAP25",
        "AC1.1",
        "U6",
        "ENSG00000166471",  # TMEM41B
        "NOTAGENE",
        ensembl=["", "", "ENSG00000283675", "ENSG00000283666", "ENSG00000166471", ""],
    )
    match = vocabulary.match(genes)
    np.testing.assert_array_equal(match.columns, [1, 2, 3, 0, 4])
    np.testing.assert_array_equal(match.tokens, range(5))
    assert (match.by_symbol, match.by_ensembl, match.by_hgnc, match.n_genes) == (1, 2, 2, 6)
    assert str(match).startswith("5 of 6 genes are in the vocabulary: 1 by symbol, 2 by Ensembl id")
    assert vocabulary.match(genes) is match


def test_a_token_goes_to_one_column():
    vocabulary = GeneVocabulary({"MARCH1": 0, "MARCHF1": 1, "MARCHF2": 2})
    match = vocabulary.match(names("MARCHF1", "MARCH2", "MARCHF2"))
    np.testing.assert_array_equal(match.columns, [0, 2])  # MARCH2 is MARCHF2, which is there
    np.testing.assert_array_equal(match.tokens, [1, 2])
    renamed = vocabulary.match(names("ENSG00000145416", ensembl=["ENSG00000145416"]))
    np.testing.assert_array_equal(renamed.tokens, [1])  # the approved one of two names


def test_the_ensembl_id_outweighs_a_former_symbol():
    """MARC1 was the former symbol of MTARC1; MARCH1's id says which gene is meant."""
    vocabulary = GeneVocabulary({"MTARC1": 0, "MARCHF1": 1})
    by_name = vocabulary.match(names("MARC1"))
    by_id = vocabulary.match(names("MARC1", ensembl=["ENSG00000145416"]))
    assert (by_name.tokens[0], by_id.tokens[0]) == (0, 1)


def test_selected_counts_have_no_stored_zeros():
    match = GeneVocabulary({"B": 5, "A": 9}).match(names("A", "C", "B"))
    counts = sparse.csr_array((np.array([0, 7, 3, 2]), ([0, 0, 1, 1], [0, 1, 0, 2])), shape=(2, 3))
    found = match.select(counts)
    np.testing.assert_array_equal(found.toarray(), [[0, 0], [2, 3]])
    assert found.nnz == 2
    assert found.has_sorted_indices


def test_genes_of_another_species(small, counts):
    with pytest.raises(ModelError, match="look like mouse"):
        encode(small, counts[:, :2], names("Gapdh", "Actb"))
    with pytest.raises(ModelError, match="none of the slide's 2 genes") as error:
        encode(small, counts[:, :2], names("X", "Y"))
    assert error.value.fix is None


@pytest.mark.parametrize("name", ["scgpt", "scfoundation"])
def test_they_are_registered(name, tmp_path):
    entry = find(name, "gene")
    assert isinstance(entry, FrozenEntry)
    folder = (save_small if name == "scgpt" else save_network)(tmp_path / name)
    encoder = entry.load(folder)
    assert encoder.name == name
    assert encoder.modality == "gene"
    with pytest.raises(TypeError, match="reads genes"):
        encoder.encode_images(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ModelError, match=f"{name}"):
        entry.load(None)
    with pytest.raises(ModelError, match="missing"):
        entry.load(tmp_path / "nowhere")


def test_slides_with_as_many_other_genes(small, counts):
    one = encode(small, counts, names(*SYMBOLS))
    genes = dataclasses.replace(names(*SYMBOLS), symbols=np.array(SYMBOLS[::-1]))
    assert not torch.allclose(encode(small, counts, genes), one, atol=1e-3)
