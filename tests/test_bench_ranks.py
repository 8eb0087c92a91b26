"""Ranks share the cells of a bench: the same table as one process makes, each cell made once."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import toy_run
from ranks import as_srun, as_torchrun, launch, start
from st_align import cli, job, loss
from st_align.benchmarks import cells
from st_align.benchmarks.cells import Bench, Cell, SkippedError
from st_align.benchmarks.table import Row
from st_align.config import LossConfig
from st_align.corpus_build import build_corpus
from st_align.embedded import to_anndata
from st_align.errors import OutputError, SlideError
from st_align.infer import Embedder
from st_align.store import write_h5ad
from test_loss import facts, scale_of
from toy_slides import toy_ref
from toys import two_patients

WORKER = Path(__file__).parent / "bench_worker.py"
CONFIG = """
[model]
dim = 8
heads = 2
tokens = 4
gene_layers = 1
niche_image = "toy-colour"
[optim]
batch = 16
epochs = 1
[data]
panel = 20
[readout]
use = "gene"
dims = 4
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    refs = [toy_ref(f"{p}{i}", rows=6) for p in "ab" for i in (1, 2)]
    out = tmp_path_factory.mktemp("ranks") / "corpus"
    return build_corpus(refs, out, spot_px=16, niche_px=24, progress=False)


class Job(SimpleNamespace):
    """What the processes of `st-align bench` said, their exit codes, what each of them made."""


def bench(folder: Path, *words: object, ranks: int, tell=as_torchrun) -> Job:
    """Run it into `folder`/out."""
    arguments = [folder / "rank", *words, "--out", folder / "out"]
    folder.mkdir()
    if ranks == 1:
        processes = [launch(WORKER, *arguments, environment={})]
    else:
        processes = start(WORKER, *arguments, ranks=ranks, tell=tell)
    said = [process.communicate(timeout=300)[0] for process in processes]
    made = [path.read_text().splitlines() for path in sorted(folder.glob("rank-*.txt"))]
    return Job(said=said, codes=[process.returncode for process in processes], made=made,
               out=folder / "out", table=(folder / "out" / "results.csv").read_text())  # fmt: skip


def require_same(one: Job, two: Job) -> None:
    """One process and two: the same table, the same work, none of it done twice."""
    assert two.table == one.table
    assert len(two.made) == 2
    everything = Counter(two.made[0]) + Counter(two.made[1])
    assert everything == Counter(one.made[0])
    assert set(everything.values()) == {1}


# --- jobs of two processes --------------------------------------------------------------------


def test_two_ranks_make_the_table_of_one_process_and_try_what_fails_once(
    corpus, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("ST_ALIGN_TEST_FAIL", "1")
    words = ("genes", corpus.path, "--genes", "GENE0,GENE3")
    one, two = (bench(tmp_path / str(ranks), *words, ranks=ranks) for ranks in (1, 2))
    require_same(one, two)
    assert one.codes == [1]
    assert two.codes == [1, 0], two.said
    assert two.table.count("failed: no colour today") == 4  # two folds, two tracks
    assert "4 cells failed; the same command tries them again" in two.said[0]
    assert "written: " in two.said[0]
    assert "written: " not in two.said[1]
    facts = [json.loads((job.out / "provenance.json").read_text()) for job in (one, two)]
    assert facts[0]["failed"] == facts[1]["failed"]
    assert facts[0]["seconds"]["cells"].keys() == facts[1]["seconds"]["cells"].keys()


@pytest.mark.slow
def test_srun_shares_domains_too(tmp_path) -> None:
    """An embedding and its scores are of one rank."""
    slides = two_patients(np.random.default_rng(0))
    run = toy_run.toy_run(slides)
    for slide in slides:
        write_h5ad(to_anndata(run, slide, Embedder(run).embed(slide)),
                   tmp_path / "h5ad" / f"{slide.id}.h5ad")  # fmt: skip
    words = ("domains", tmp_path / "h5ad", "--label-key", "domain", "--runs", 2,
             "--rows", "Scanpy-style PCA")  # fmt: skip
    one = bench(tmp_path / "1", *words, ranks=1)
    two = bench(tmp_path / "2", *words, ranks=2, tell=as_srun)
    assert one.codes + two.codes == [0, 0, 0], two.said
    require_same(one, two)


@pytest.mark.slow
def test_each_run_of_an_ablation_is_trained_by_one_rank_alone(corpus, tmp_path) -> None:
    (tmp_path / "toy.toml").write_text(CONFIG)
    words = ("ablation", corpus.path, "--config", tmp_path / "toy.toml", "--label-key", "layer",
             "--hold-out-patient", "b", "--genes", "GENE0", "--seeds", 1)  # fmt: skip
    one, two = (bench(tmp_path / str(ranks), *words, ranks=ranks) for ranks in (1, 2))
    assert one.codes + two.codes == [0, 0, 0], two.said
    require_same(one, two)
    assert all(any(line.startswith("run ") for line in made) for made in two.made)
    assert "seed 0:" in two.said[0]
    assert "seed 0:" not in two.said[1]


# --- who makes which cell ---------------------------------------------------------------------


def as_rank(patch: pytest.MonkeyPatch, rank: int, ranks: int = 2, told=()) -> None:
    """Benches from now on are of this rank; `told` are the other ranks' words to the first."""
    fabric = SimpleNamespace(global_rank=rank, world_size=ranks, is_global_zero=rank == 0)
    patch.setattr(cells, "launch", lambda: fabric)
    patch.setattr(cells, "gather", lambda _, value: [value, *told])


def make_all(bench: Bench, made: list[str], *, slides=("s1", "s2", "s3")) -> list[Cell]:
    """Two methods by slide, each of two cells that read one another; then three of no slide."""

    def ask(name: str, of: Row) -> Cell:
        def make() -> Cell:
            made.append(name)
            return Cell(rows=(of,), arrays={"x": np.arange(3)})

        return bench.cell(name, {"name": name}, of, make)

    found = []
    for method in ("A", "B"):
        for slide in slides:
            of = Row(slide=slide, method=method)
            found.append(ask(f"{slide} {method} embedding", of))
            if found[-1].arrays:
                found.append(ask(f"{slide} {method}", of))
    return found + [ask(f"run {seed}", Row(slide="", method="C")) for seed in range(3)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_each_cell_is_of_one_rank_whatever_lies_on_the_disk(tmp_path, monkeypatch, ranks) -> None:
    shares = []
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        shares.append([])
        bench = Bench(tmp_path)
        make_all(bench, shares[-1])
    everything = [name for share in shares for name in share]
    assert len(everything) == len(set(everything)) == 15
    for share in shares:
        assert {n for n in share if "embedding" in n} == {
            f"{n} embedding" for n in share if f"{n} embedding" in everything
        }
    assert max(map(len, shares)) - min(map(len, shares)) <= 3


def test_other_ranks_have_no_result_and_the_first_reads_all_cells(tmp_path, monkeypatch) -> None:
    made: list[str] = []
    as_rank(monkeypatch, 1)
    assert Bench(tmp_path).collect(lambda: 1) is None
    make_all(Bench(tmp_path), made)
    as_rank(monkeypatch, 0, told=[({}, 0.5)])
    bench = Bench(tmp_path)
    found = bench.collect(lambda: make_all(bench, made))
    assert len(found) == len(made) == len(bench.costs) == 15
    assert all(len(cell.arrays["x"]) == 3 for cell in found)


def test_what_failed_elsewhere_is_a_row_and_is_not_tried_again(tmp_path, monkeypatch) -> None:
    reasons = {"A": SlideError("no spots"), "B": SkippedError("no weights"), "C": ValueError("x")}

    def make_all(bench: Bench) -> list[Cell]:
        def fail(method: str) -> Cell:
            tried.append(method)
            raise reasons[method]

        return [
            bench.cell(method, {}, Row(slide="s", method=method), lambda m=method: fail(m))
            for method in reasons
        ]

    tried: list[str] = []
    as_rank(monkeypatch, 1)
    other = Bench(tmp_path)
    other.collect(lambda: make_all(other))
    assert tried == ["B"]
    as_rank(monkeypatch, 0, told=[(other._unmade, 0.5)])
    bench = Bench(tmp_path)
    found = bench.collect(lambda: make_all(bench))
    assert sorted(tried) == ["A", "B", "C"]
    notes = [cell.rows[0].note for cell in found]
    assert notes == ["failed: no spots", "no weights", "failed: ValueError('x')"]
    assert bench.failed == ["A: no spots", "C: ValueError('x')"]


def test_a_folder_that_ranks_do_not_share_is_noticed(tmp_path, monkeypatch) -> None:
    as_rank(monkeypatch, 0, told=[({}, 0.5)])
    bench = Bench(tmp_path)
    with pytest.raises(OutputError, match=r"(?s)s2 A embedding.*that all machines share"):
        bench.collect(lambda: make_all(bench, []))


def test_a_rank_that_died_is_noticed_when_cells_are_gathered(monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    monkeypatch.setattr(job.dist, "all_gather_object", broken)
    with pytest.raises(job.TrainingError, match="rank 0 of 2 lost the others"):
        job.gather(SimpleNamespace(global_rank=0, world_size=2), 1)


@pytest.mark.parametrize(("orderly", "backend", "left"), [
    (True, "gloo", True), (False, "gloo", True), (True, "nccl", True), (False, "nccl", False),
])  # fmt: skip
def test_ranks_part_before_they_exit(monkeypatch, orderly, backend, left) -> None:
    parted: list[bool] = []
    monkeypatch.setattr(job.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(job.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(job.dist, "destroy_process_group", lambda: parted.append(True))
    job.leave(orderly=orderly)
    assert bool(parted) == left


def test_a_command_leaves_its_job_whether_it_ends_well_or_not(monkeypatch, capsys) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(job, "leave", lambda *, orderly: asked.append(orderly))
    for end in (SystemExit(0), SlideError("no spots")):
        monkeypatch.setattr(cli, "app", lambda end=end: (_ for _ in ()).throw(end))
        with pytest.raises(SystemExit):
            cli.main()
    assert asked == [True, False]
    assert "no spots" in capsys.readouterr().err


def test_speed_is_measured_on_one_process(tmp_path, monkeypatch, capsys) -> None:
    for name, value in as_torchrun(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    words = ["st-align", "bench", "speed", "start", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "start it without torchrun" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_loss_alone_asks_no_other_rank(monkeypatch) -> None:
    n, rng = 8, np.random.default_rng(0)
    vectors = [torch.from_numpy(rng.normal(size=(n, 4))) for _ in loss.Embeddings._fields]
    asked = (loss.Embeddings(*vectors), facts(np.zeros((n, n), bool)), scale_of(0.07))
    wanted = loss.StAlignLoss(LossConfig())(*asked).total
    monkeypatch.setattr(loss, "_distributed", lambda: True)
    monkeypatch.setattr(loss, "_gather", lambda _: pytest.fail("asked"))
    assert loss.StAlignLoss(LossConfig(), alone=True)(*asked).total == wanted
