"""Frozen features: what is stored, how it is resumed, and what it refuses."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from st_align import features, spill
from st_align.corpus import Corpus
from st_align.corpus_build import build_corpus
from st_align.encoders.base import Encoded
from st_align.errors import CorpusError, ModelError, OutputError
from st_align.features import cached_features, slide_features
from toy_slides import toy_ref, toy_slide
from toys import toy_prepared

TOKENS, DIM, BATCH = 3, 5, 4


class FakeImages:
    """Tokens and pooled are plain functions of a patch's mean colour; stops at call `fail_at`."""

    name, modality, n_tokens, dim = "fake", "image", TOKENS, DIM

    def __init__(self, fingerprint: str = "0123456789ab", fail_at: int | None = None) -> None:
        self.fingerprint, self.fail_at, self.calls = fingerprint, fail_at, 0

    def encode_images(self, patches) -> Encoded:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return self.of(torch.from_numpy(patches).float().mean(dim=(1, 2, 3)))

    def of(self, values) -> Encoded:
        steps = torch.arange(TOKENS * DIM).reshape(TOKENS, DIM)
        return Encoded(values[:, None, None] + steps, values[:, None] * torch.ones(DIM))


class FakeGenes(FakeImages):
    """Pooled is the library size, and what chance adds."""

    modality = "gene"

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def encode_genes(self, counts, genes, total_umi, rng) -> Encoded:
        assert counts.shape == (len(total_umi), len(genes))
        np.testing.assert_array_equal(counts.sum(axis=1), total_umi)
        self.seen.append(counts.toarray())
        return self.of(torch.from_numpy(total_umi + rng.random(len(total_umi))).float())


def encode(slide, encoder, view="spot", **kwargs):
    return slide_features(slide, encoder, view, niche_spec="lattice", **({"batch": BATCH} | kwargs))


def cache(corpus, encoder, view="niche", slide_id="a", **kwargs):
    options = {"niche_spec": "lattice", "batch": BATCH} | kwargs
    return cached_features(corpus, slide_id, encoder, view, **options)


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    """Slides of 16 spots: 4 batches of 4."""
    return build_corpus([toy_ref("a"), toy_ref("b")], tmp_path, progress=False)


@pytest.fixture
def folder(corpus) -> Path:
    return corpus.folder("a") / "features" / "fake-0123456789ab-niche-lattice"


class TestSlide:
    @pytest.mark.parametrize("view", ["spot", "niche"])
    def test_images(self, rng, view):
        slide = toy_prepared(rng)
        found = encode(slide, FakeImages(), view)
        patches = slide.spot_patches if view == "spot" else slide.niches["lattice"].patches
        mean = patches.mean(axis=(1, 2, 3))
        assert found.tokens.shape == (36, TOKENS, DIM)
        assert found.tokens.dtype == found.pooled.dtype == np.float16
        np.testing.assert_allclose(found.pooled[:, 0], mean, rtol=1e-3)
        np.testing.assert_allclose(found.tokens[:, 2, 4], mean + 14, rtol=1e-3)

    def test_what_memory_does_not_hold_is_the_same(self, rng, monkeypatch):
        slide = toy_prepared(rng)
        whole = encode(slide, FakeImages())
        row = whole.tokens[0].nbytes
        monkeypatch.setattr(spill, "IN_MEMORY", 2 * row)
        monkeypatch.setattr(spill, "BLOCK", 20 * row)
        mapped = encode(slide, FakeImages())
        np.testing.assert_array_equal(whole.tokens, mapped.tokens)
        np.testing.assert_array_equal(whole.pooled, mapped.pooled)

    def test_genes_of_a_niche_are_the_sum_over_its_members(self, rng):
        slide, encoder = toy_prepared(rng), FakeGenes()
        found = encode(slide, encoder, "niche")
        counts, members = slide.counts.toarray(), slide.niches["lattice"].neighbors
        wanted = np.array([counts[m[m >= 0]].sum(axis=0) for m in members])
        np.testing.assert_array_equal(np.concatenate(encoder.seen), wanted)
        assert (np.abs(found.pooled[:, 0] - wanted.sum(axis=1)) < 3).all()

    def test_spots_without_a_library_get_zeros(self, rng):
        slide = toy_prepared(rng)
        keep = np.arange(36) % 3 > 0
        slide = dataclasses.replace(
            slide,
            counts=slide.counts.multiply(keep[:, None]).tocsr().astype(np.int32),
            spots=slide.spots.assign(total_umi=slide.total_umi * keep),
        )
        found = encode(slide, FakeGenes())
        assert not found.pooled[~keep].any()
        assert not found.tokens[~keep].any()
        assert (found.pooled[keep] > 0).all()

    def test_chance_is_seeded(self, rng):
        slide = toy_prepared(rng)
        one, same, other = (encode(slide, FakeGenes(), seed=s).pooled for s in (1, 1, 2))
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, other)

    def test_a_slide_without_the_modality(self, rng):
        assert encode(toy_prepared(rng, image=False), FakeImages()) is None
        assert encode(toy_prepared(rng, counts=False), FakeGenes()) is None

    def test_values_beyond_float16_are_clipped(self, rng):
        encoder = FakeImages()
        encoder.of = lambda v: Encoded(
            v[:, None, None].expand(-1, TOKENS, DIM) * 1e9, v[:, None].expand(-1, DIM)
        )
        found = encode(toy_prepared(rng), encoder)
        assert np.isfinite(found.tokens).all()
        assert (found.tokens == np.finfo(np.float16).max).all()

    @pytest.mark.parametrize("wrong", ["shape", "nan"])
    def test_unusable_output_names_encoder_and_slide(self, rng, wrong):
        encoder = FakeImages()
        nan = {"nan": torch.nan, "shape": 0}[wrong]
        width = {"nan": DIM, "shape": DIM + 1}[wrong]
        encoder.of = lambda v: Encoded(
            torch.zeros(len(v), TOKENS, DIM), torch.full((len(v), width), nan)
        )
        with pytest.raises(ModelError, match="'fake' gave unusable features on 'toy'"):
            encode(toy_prepared(rng), encoder)

    def test_unknown_niche_names_the_command(self, rng):
        with pytest.raises(CorpusError, match="--niche k9"):
            slide_features(toy_prepared(rng), FakeImages(), "niche", niche_spec="k9")


class TestCache:
    @pytest.mark.parametrize("encoder", [FakeImages, FakeGenes])
    @pytest.mark.parametrize("view", ["spot", "niche"])
    def test_equals_what_a_slide_gives(self, corpus, encoder, view):
        found = cache(corpus, encoder(), view)
        wanted = encode(corpus.slide("a"), encoder(), view)
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        np.testing.assert_array_equal(found.pooled, wanted.pooled)
        assert not found.tokens.flags.writeable

    def test_the_second_call_reads_only(self, corpus, folder):
        encoder = FakeImages()
        cache(corpus, encoder)
        calls = encoder.calls
        cache(corpus, encoder)
        assert encoder.calls == calls == 4
        assert sorted(p.name for p in folder.iterdir()) == [
            "encoder.json",
            "pooled.npy",
            "tokens.npy",
        ]
        assert [p.name for p in folder.parent.iterdir()] == [folder.name]

    def test_fingerprint_view_and_niche_keep_caches_apart(self, corpus, folder):
        cache(corpus, FakeImages())
        cache(corpus, FakeImages(), "spot")
        cache(corpus, FakeImages("ba9876543210"))
        assert {p.name for p in folder.parent.iterdir()} == {
            "fake-0123456789ab-niche-lattice",
            "fake-0123456789ab-spot",
            "fake-ba9876543210-niche-lattice",
        }

    @pytest.mark.parametrize("every", [1, 2, 100])
    @pytest.mark.parametrize("encoder", [FakeImages, FakeGenes])
    def test_goes_on_mid_slide(self, corpus, folder, monkeypatch, every, encoder):
        monkeypatch.setattr(features, "_SYNC_EVERY", every)
        wanted = encode(corpus.slide("a"), encoder(), "niche")
        stopped = encoder()
        stopped.fail_at = 4
        if encoder is FakeGenes:
            counted = stopped.encode_genes

            def stop(*args):
                if len(stopped.seen) == 3:
                    raise KeyboardInterrupt
                return counted(*args)

            stopped.encode_genes = stop
        with pytest.raises(KeyboardInterrupt):
            cache(corpus, stopped)
        assert not folder.exists()
        rest = encoder()
        found = cache(corpus, rest)
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        np.testing.assert_array_equal(found.pooled, wanted.pooled)
        left = rest.calls if encoder is FakeImages else len(rest.seen)
        assert left == {1: 1, 2: 2, 100: 4}[every]

    @pytest.mark.parametrize("damage", ["torn", "header", "other shape", "behind the marker"])
    def test_half_written_files_do_no_harm(self, corpus, folder, damage):
        wanted = encode(corpus.slide("a"), FakeImages(), "niche")
        part = folder.with_name(f".{folder.name}.part")
        with pytest.raises(KeyboardInterrupt):
            cache(corpus, FakeImages(fail_at=3))
        tokens, marker = part / "tokens.npy", part / "rows"
        marker.write_text("8")
        if damage == "torn":
            tokens.write_bytes(tokens.read_bytes()[:-3])
        elif damage == "header":
            tokens.write_bytes(b"\x93NUM")
        elif damage == "other shape":
            np.save(tokens, np.zeros((2, 2), np.float16))
        else:
            marker.write_text("4")
        found = cache(corpus, FakeImages())
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        np.testing.assert_array_equal(found.pooled, wanted.pooled)

    def test_two_at_once_fill_it_once(self, corpus):
        encoders = [FakeImages(), FakeImages()]
        threads = [threading.Thread(target=cache, args=(corpus, e)) for e in encoders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(e.calls for e in encoders) == [0, 4]

    def test_another_process_is_waited_for(self, corpus, folder):
        """By the lock of a file, which is one of a process: a thread would not wait."""
        folder.parent.mkdir()
        lock = folder.with_name(f".{folder.name}.lock")
        hold = f"""import fcntl, time
with open({str(lock)!r}, "ab") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    time.sleep(0.5)"""
        with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as other:
            other.stdout.readline()
            cache(corpus, FakeImages())
            assert other.poll() is not None or other.wait(timeout=0.3) == 0
        assert [p.name for p in folder.parent.iterdir()] == [folder.name]

    def test_a_machine_that_no_lock_reaches_was_faster(self, corpus, folder):
        """What it made is taken; what this process made is let go."""

        class Slow(FakeImages):
            def encode_images(self, patches):
                if self.calls == 3:
                    folder.mkdir()
                    for name in ("tokens.npy", "pooled.npy"):
                        np.save(folder / name, np.ones((16, 2), np.float16))
                return super().encode_images(patches)

        assert (cache(corpus, Slow()).pooled == 1).all()
        assert [p.name for p in folder.parent.iterdir()] == [folder.name]

    def test_an_absent_modality_stores_nothing(self, tmp_path):
        slide = toy_slide("x", image=False)
        ref = dataclasses.replace(toy_ref("x"), read=lambda: slide)
        corpus = build_corpus([ref], tmp_path, progress=False)
        assert cache(corpus, FakeImages(), slide_id="x") is None
        assert not (corpus.folder("x") / "features").exists()

    def test_a_damaged_cache(self, corpus, folder):
        cache(corpus, FakeImages())
        path = folder / "tokens.npy"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CorpusError, match="features of slide 'a' are damaged") as caught:
            cache(corpus, FakeImages())
        assert "delete this folder" in caught.value.fix

    def test_a_corpus_that_cannot_be_written_to(self, corpus):
        (corpus.folder("a") / "features").write_text("in the way")
        with pytest.raises(OutputError, match="cannot write"):
            cache(corpus, FakeImages())

    def test_a_full_disk_says_how_much_is_needed(self, corpus, folder, monkeypatch):
        def refuse(column, values):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(features._Column, "append", refuse)
            with pytest.raises(OutputError, match="No space left") as caught:
                cache(corpus, FakeImages())
        assert "MB free" in caught.value.expected
        assert not folder.exists()
        assert cache(corpus, FakeImages()).pooled.any()


def test_a_full_disk_is_noticed_before_anything_is_written(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spill, "IN_MEMORY", 10)
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutputError, match=r"(?s)no room.*No space left.*TMPDIR"):
        spill.Spill((100, 4), np.uint8)
