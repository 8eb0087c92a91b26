"""`st-align features`: what it says of genes, spots and encoders that do not fit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from st_align.commands import features
from st_align.commands.features import FeatureRequest, fill_features
from st_align.corpus_build import build_corpus
from st_align.doctor import check, describe
from st_align.encoders._genes import FrozenGenes
from st_align.encoders._ragged import TokenSet
from st_align.encoders.base import EncoderInfo, FrozenEntry, register
from st_align.encoders.gene_vocabulary import GeneVocabulary
from st_align.errors import ConfigError
from toy_slides import toy_ref

NAME = "toy-genes"


class Sums(nn.Module):
    def forward(self, ids, values, sizes):
        return torch.stack([part.sum()[None] for part in values.split(sizes)])


class ToyGenes(FrozenGenes):
    """Knows one gene of the toy slides by its symbol and one by its Ensembl id."""

    name = NAME

    def __init__(self) -> None:
        known = ["GENE0", "ENSG00000000005", "UNSEEN"]
        tokens = {name: i for i, name in enumerate(known)}
        super().__init__(Sums(), GeneVocabulary(tokens), dim=1, mark="ab" * 6, device=None)

    def token_set(self, ids, counts, salt):
        return TokenSet(ids, counts.astype(np.float32)) if len(ids) else None


register(
    FrozenEntry(
        name=NAME,
        modality="gene",
        info=EncoderInfo(
            title="toy",
            licence="MIT",
            gated=False,
            source="nowhere",
            files=("a.pt", "b.pt", "c.pt"),
            beside=("args.json", "vocab.json"),
        ),
        load=lambda _: ToyGenes(),
    )
)


@pytest.fixture
def corpus(tmp_path):
    return build_corpus([toy_ref("a"), toy_ref("b")], tmp_path / "corpus", progress=False)


def ask(**options):
    return FeatureRequest(**({"encoder": NAME} | options))


def test_genes_found_by_each_route_and_spots_without_any_are_said(corpus, capsys):
    result = fill_features(corpus.path, ask())
    said = capsys.readouterr().out
    assert "  a: 2 of 12 genes are in the vocabulary: 1 by symbol, 1 by Ensembl id, 0 by" in said
    empty = {
        id: int((corpus.slide(id).counts.toarray()[:, [0, 5]].sum(axis=1) == 0).sum())
        for id in ("a", "b")
    }
    assert sum(empty.values()) > 0
    assert f"{sum(empty.values())} of 32 spots express no gene of it: zero vectors" in said
    assert result["genes"]["b"] == {
        "measured": 12,
        "found": 2,
        "by_symbol": 1,
        "by_ensembl": 1,
        "by_synonym": 0,
        "spots": 16,
        "spots_without_genes": empty["b"],
    }
    again = fill_features(corpus.path, ask())
    assert (again["computed"], again["cached"]) == (0, 2)
    assert again["genes"] == result["genes"]


def test_of_many_slides_those_with_the_smallest_share_are_listed(tmp_path, capsys):
    refs = [toy_ref(f"s{i}") for i in range(7)]
    build_corpus(refs, tmp_path / "many", progress=False)
    fill_features(tmp_path / "many", ask())
    said = capsys.readouterr().out
    assert said.count("are in the vocabulary") == 5
    assert "the other 2 slides" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"what": "image"}, ("toy-genes reads genes", "efficientnet-lite0", "uni2")),
        ({"encoder": "uni", "what": "gene"}, ("uni reads images", "scgpt", "scfoundation")),
        ({"what": "genes"}, ("--what genes", "did you mean 'gene'")),
        ({"view": "spots"}, ("--view spots", "did you mean 'spot'")),
        ({"encoder": "ae-gene"}, ("trained with the model", "scgpt")),
        ({"patch_um": 112.0}, ("reads genes", "no field of view")),
    ],
)
def test_what_does_not_fit_says_what_would(corpus, options, words):
    with pytest.raises(ConfigError) as caught:
        fill_features(corpus.path, ask(**options))
    for word in words:
        assert word in str(caught.value)


def test_what_is_asked_for_may_be_said(corpus):
    found = fill_features(corpus.path, ask(what="gene"))
    assert (found["what"], found["view"]) == ("gene", "spot")
    assert fill_features(corpus.path, ask(view="niche"))["computed"] == 2


def test_doctor_tells_alternatives_from_files_that_belong_together():
    found = describe(check([], None))
    assert "pytorch_model.bin or model.safetensors;" in found
    assert "hibou-b.pth, model.safetensors or pytorch_model.bin;" in found
    assert "best_model.pt, with args.json and vocab.json in its folder" in found
    assert "sees the corpus's patches, as they are" in found


def test_ranks_share_the_slides(corpus, monkeypatch):
    """The second of two ranks, which does not have the result."""
    second = SimpleNamespace(global_rank=1, world_size=2, is_global_zero=False)
    second.device, second.all_reduce = "cpu", lambda counts, reduce_op: counts
    monkeypatch.setattr(features, "launch", lambda: second)
    assert fill_features(corpus.path, ask()) is None
    assert [path.parents[1].name for path in corpus.path.glob("slides/*/features/*")] == ["b"]
