"""The benchmark beside other people's code, without their code: a script that prints fixed times."""

import ast
import csv
import dataclasses
import importlib
import sys

import pytest

from experiments import bench, bench_peers, timing
from experiments.peers import ours as ops
from zoo import registry

TIMES = '{"forward": 2.0, "forward_backward": 3.0, "decode": 0.5, "parameters": 7}'


def test_every_peer_is_in_its_script_and_here():
    for name, peer in bench_peers.PEERS.items():
        tree = ast.parse((bench_peers.FOLDER / peer.script).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if name in ops.OPS:
            importlib.import_module(f"pallas_kernels.{peer.ours}")
        else:
            registry.config(peer.ours, bench_peers.WIDTH, **peer.settings)
    assert set(ops.OPS) < set(bench_peers.PEERS)


@pytest.fixture
def peers(tmp_path, monkeypatch):
    """`s5` runs, `lru` is not installed and `s4d` breaks."""
    (tmp_path / "good.py").write_text(f"print('a warning')\nprint('{TIMES}')")
    (tmp_path / "bad.py").write_text("raise SystemExit('out of order')")
    good = dataclasses.replace(
        bench_peers.PEERS["s5"], script=str(tmp_path / "good.py"), packages=("pytest", "jax")
    )
    peers = {
        "lru": dataclasses.replace(good, packages=("no-such-package", "jax")),
        "s4d": dataclasses.replace(good, script=str(tmp_path / "bad.py")),
        "s5": good,
    }
    monkeypatch.setattr(bench_peers, "PEERS", peers)


def test_what_cannot_run_is_named_and_the_rest_are_in_the_table(peers, tmp_path, capsys):
    options = ["--peer-python", sys.executable, "--width", "8", "--lengths", "16", "--out", str(tmp_path)]
    assert bench.main(["peers", *options]) == 1
    said = capsys.readouterr().out
    assert "lru: no interpreter given has no-such-package" in said and "s4d: out of order" in said
    with (tmp_path / "peers_8_16.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert row["name"] == "s5" and "pytest " in row["packages"] and row["parameters_theirs"] == "7"
    theirs = {"forward": 2e3, "forward_backward": 3e3, "decode": 5e5, "decode_loop": 5e5}
    for key, time in theirs.items():
        ours = float(row[f"{key}_ours_{'us' if 'decode' in key else 'ms'}"])
        assert float(row[f"{key}_ratio"]) == pytest.approx(time / ours)


def test_a_table_grows_by_other_names(tmp_path):
    options = ["--width", "8", "--lengths", "4", "--out", str(tmp_path)]
    for name in ("base_conv", "min_gru"):
        assert bench.main(["layers", "--layers", name, "--add", *options]) == 0
    rows, notes = timing.kept(tmp_path / "layers_8", [])
    assert [(row["layer"], row["T"]) for row in rows] == [("base_conv", 4), ("min_gru", 4)]
    assert len(notes) == 2 and "--layers min_gru --add" in notes[1]
    assert all(row["forward_ms"] > 0 and row["naive_ms"] is None for row in rows)
    assert [row["layer"] for row in timing.kept(tmp_path / "layers_8", ["base_conv"])[0]] == ["min_gru"]
