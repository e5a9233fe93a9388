"""Training on a mesh is training on one device; checkpoints go from any mesh to any other."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments import mesh, scale_check
from experiments.config import difference, from_dict, to_dict
from experiments.mesh import Mesh, Placement
from experiments.step import Programs
from experiments.train import train
from zoo import checkpoint, digests, sharding

ROOT = Path(__file__).parent.parent
FOUR = Mesh(data=2, tensor=2)  # as many devices as conftest simulates


def short(layer="gla", **changes):
    return replace(scale_check.run_of(layer), steps=4, log_every=1, eval_batches=1, **changes)


def place(name, shape, sizes):
    path = [jax.tree_util.DictKey(key) for key in name.split("/")]
    return sharding.parameter(path, shape, sizes)


def test_rules_by_name():
    sizes = {"fsdp": 2, "tensor": 4}
    assert place("w_embed", (64, 32), sizes) == P("tensor", "fsdp")
    assert place("blocks/mlp/w_in", (3, 32, 64), sizes) == P(None, "fsdp", "tensor")
    assert place("blocks/mlp/w_in", (3, 32, 8, 64), sizes) == P(None, "fsdp", None, "tensor")
    assert place("0/mu/blocks/mixer/w_out", (3, 64, 32), sizes) == P(None, "tensor", "fsdp")
    assert place("blocks/mixer/A_log", (3, 16, 8), sizes) == P(None, None, None)
    assert place("blocks/norm_mixer", (3, 32), sizes) == P()
    # What does not divide stays whole, and so does everything along an axis that is not there.
    assert place("blocks/mixer/w_qkv", (3, 33, 30), sizes) == P(None, None, None)
    assert place("w_head", (32, 64), {"data": 8}) == P(None, None)


def test_wrong_meshes_are_one_line():
    with pytest.raises(ValueError, match=r"mesh: data 2 \* fsdp 1 .* = 2 devices, but there are 4"):
        train(short(mesh=Mesh(data=2)), progress=False)
    with pytest.raises(ValueError, match=r"mesh: data \* fsdp = 4 does not divide batch_size / accumulate=6"):
        train(short(mesh=Mesh(data=2, fsdp=2), batch_size=6), progress=False)
    with pytest.raises(ValueError, match="sequence=4 does not divide the data's length=34"):
        wrong = replace(short().data, length=34)
        train(short(mesh=Mesh(sequence=4), data=wrong), progress=False)
    with pytest.raises(ValueError, match="mesh: tensor=0 must be an integer >= 1"):
        Mesh(tensor=0)


def test_a_mesh_is_no_other_run():
    run, cut = short(), short(mesh=FOUR)
    assert "mesh" not in to_dict(run)
    assert from_dict(to_dict(cut)) == cut
    assert difference(run, cut) == []


def losses(result):
    return np.array([row["loss"] for row in result.rows])


@pytest.mark.parametrize("layer", ["gla", "lru"])
def test_a_mesh_of_four_is_one_device(layer, float32):
    """LRU: a partitioned gradient of its read-out at few positions was wrong once, values right."""
    run = short(layer)
    state = jax.device_get(Programs(run).initial(jax.random.key(0)))
    cut = replace(run, mesh=FOUR if layer == "gla" else Mesh(fsdp=2, tensor=2))
    wanted, found = scale_check.losses_on(run, state), scale_check.losses_on(cut, state)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.deep
def test_training_goes_on_across_meshes(float32, tmp_path):
    """One device, then four, then one: as one device all the way; parameters lie as the table says."""
    alone = train(short(), progress=False)
    for until, cut in ((1, mesh.ONE_DEVICE), (3, FOUR), (4, mesh.ONE_DEVICE)):
        result = train(short(mesh=cut), tmp_path, progress=False, until=until)
        if cut == FOUR:
            assert result.params["w_embed"].sharding.shard_shape((64, 32)) == (32, 32)
    np.testing.assert_allclose(losses(result), losses(alone), rtol=1e-6)


@pytest.mark.deep
def test_accumulated_and_passed_states_on_a_mesh(float32):
    settings = {"accumulate": 2, "initial_state": "carried", "loss_chunk": 16}
    alone, cut = (train(short(mesh=m, **settings), progress=False) for m in (mesh.ONE_DEVICE, FOUR))
    np.testing.assert_allclose(losses(cut), losses(alone), rtol=1e-6)


@pytest.mark.deep
@pytest.mark.parametrize("name", scale_check.MESHES)
@pytest.mark.parametrize("layer", ["attention", "mamba2", "gated_delta_net", "s4d"])
def test_fifty_steps(layer, name, float32):
    cut = scale_check.MESHES[name]
    if cut.devices > jax.device_count():
        pytest.skip("more devices than the tests simulate: python -m experiments.scale_check")
    state = jax.device_get(Programs(scale_check.run_of(layer)).initial(jax.random.key(0)))
    wanted = scale_check.losses_on(scale_check.run_of(layer), state)[-1]
    assert scale_check.difference(scale_check.run_of(layer, cut), state, wanted) <= scale_check.ALLOWED


def arrays():
    rng = np.random.default_rng(0)
    return {
        "w_in": rng.normal(size=(8, 12)).astype(np.float32),
        "blocks": {"w_out": rng.normal(size=(2, 8, 4)).astype(np.float32)},
        "odd": np.arange(7, dtype=np.int8),
        "half": rng.normal(size=(6, 4)).astype(jax.numpy.bfloat16),
        "one": np.float32(3),
    }


def placed(cut):
    if cut is None:
        return arrays()
    placement = Placement(cut, jax.devices()[: cut.devices])
    return jax.device_put(arrays(), placement.of_state(arrays()))


@pytest.mark.parametrize("saved", [None, Mesh(fsdp=2), Mesh(fsdp=2, tensor=2)], ids=str)
@pytest.mark.parametrize("wanted", [None, Mesh(tensor=4), Mesh(data=4)], ids=str)
def test_checkpoints_on_other_meshes(tmp_path, saved, wanted):
    checkpoint.save(tmp_path, 1, placed(saved))
    template = placed(wanted)
    _, restored, _ = checkpoint.restore(tmp_path, template)
    for a, b, asked in zip(*map(jax.tree.leaves, (arrays(), restored, template)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert wanted is None or b.sharding.is_equivalent_to(asked.sharding, b.ndim)


def named(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_digests_depend_on_content_alone():
    found = digests.digests(named(arrays()))
    assert digests.digests(named(placed(Mesh(fsdp=2, tensor=2)))) == found
    swapped = named(jax.tree.map(lambda x: x[::-1] if x.ndim else x + 1, arrays()))
    assert all(digest != found[name] for name, digest in digests.digests(swapped).items())
    large = np.arange(3 * digests.BLOCK, dtype=np.float32).reshape(3, -1)
    whole = digests.digests({"x": large})
    large[2, 5] += 1
    assert digests.digests({"x": large}) != whole


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(command, processes, devices):
    """Standard output of `command` in so many processes of one run."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path]),
    }
    where = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={processes}"]
    started = [
        subprocess.Popen(
            [*command, *where, f"--process={number}"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(processes)
    ]  # fmt: skip
    ended = [process.communicate(timeout=550) for process in started]
    for process, (_, error) in zip(started, ended, strict=True):
        assert process.returncode == 0, error
    return [out for out, _ in ended]


CHECKPOINT = """
import argparse, sys
from experiments import distributed

parser = argparse.ArgumentParser()
parser.add_argument("verb")
parser.add_argument("directory")
distributed.add_arguments(parser)
options = parser.parse_args()
distributed.start(options)

import jax, numpy as np
import test_scale
from zoo import checkpoint

tree = test_scale.arrays()
places = test_scale.Placement(test_scale.Mesh(fsdp=2, tensor=2)).of_state(tree)
make = jax.make_array_from_callback
cut = jax.tree.map(lambda x, place: make(x.shape, place, lambda i: x[i]), tree, places)
if options.verb == "save":
    checkpoint.save(options.directory, 1, cut)
else:
    _, restored, _ = checkpoint.restore(options.directory, cut)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(restored), strict=True):
        for shard in y.addressable_shards:
            np.testing.assert_array_equal(shard.data, x[shard.index])
"""


@pytest.mark.deep
@pytest.mark.timeout(600)
def test_checkpoints_of_four_processes_and_of_one(tmp_path):
    (tmp_path / "script.py").write_text(CHECKPOINT)
    command = [sys.executable, str(tmp_path / "script.py")]
    together([*command, "save", str(tmp_path / "four")], 4, 1)
    _, restored, _ = checkpoint.restore(tmp_path / "four", arrays())
    jax.tree.map(np.testing.assert_array_equal, restored, arrays())
    checkpoint.save(tmp_path / "one", 1, arrays())
    together([*command, "restore", str(tmp_path / "one")], 4, 1)


CONFIG = """
from dataclasses import replace
from experiments import scale_check
config = replace(
    scale_check.run_of("gla"), steps=4, log_every=1, eval_batches=1, checkpoint_every=2
)
"""


def trained(path, cut, processes, devices):
    """A run of the command line; what its processes told."""
    path.mkdir(exist_ok=True)
    (path / "config.py").write_text(CONFIG)
    axes = [f"--mesh.{name}={size}" for name, size in cut.sizes.items()]
    command = [sys.executable, "-m", "experiments.cli", "train", str(path / "config.py")]
    return together([*command, f"--out={path / 'run'}", *axes], processes, devices)


@pytest.mark.deep
@pytest.mark.timeout(600)
def test_two_processes_are_one(float32, tmp_path):
    """Two processes of two devices train, and one process reads what they wrote and goes on."""
    told = trained(tmp_path, FOUR, 2, 2)
    assert "wall_seconds" in told[0]
    assert "wall_seconds" not in told[1]
    steps = [row["loss"] for row in map(json.loads, (tmp_path / "run/metrics.jsonl").open())]
    alone = train(short(checkpoint_every=2), progress=False)
    np.testing.assert_allclose(steps, losses(alone), rtol=1e-6)
    params = checkpoint.load_params(tmp_path / "run")
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.deep
@pytest.mark.timeout(600)
def test_four_processes_go_on_where_one_stopped(float32, tmp_path):
    alone = train(short(checkpoint_every=2), progress=False)
    train(short(checkpoint_every=2), tmp_path / "run", progress=False, until=2)
    trained(tmp_path, Mesh(data=2, fsdp=2), 4, 1)
    steps = [row["loss"] for row in map(json.loads, (tmp_path / "run/metrics.jsonl").open())]
    np.testing.assert_allclose(steps, losses(alone), rtol=1e-6)


def test_flags_that_do_not_go_together(capsys):
    from experiments import cli

    assert cli.main(["train", "text", "--processes=2"]) == 2
    assert "--coordinator, --processes and --process go together: no --coordinator" in capsys.readouterr().err
    assert cli.main(["train", "text", "--coordinator=h:1", "--processes=2", "--process=2"]) == 2
    assert "--process=2 must be from 0 to 1" in capsys.readouterr().err
