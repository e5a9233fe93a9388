"""What the compilation of kernels makes of what compilers say, without compilers."""

import csv
import sys

import pytest

from experiments import compile_kernels, kernel_targets, kernel_workers, timing
from experiments.compile_kernels import Job
from experiments.kernel_cases import DIRECTIONS, VARIANTS, Case

PTXAS = """
Resources(smem_scratch_bytes=99328, tmem_scratch_cols=0)
ptxas info    : Compiling entry function 'forward_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 177 registers, used 2 barriers, 1 bytes smem
Resources(smem_scratch_bytes=1024, tmem_scratch_cols=0)
ptxas info    : Compiling entry function 'backward_mosaic_gpu_kernel' for 'sm_90a'
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 1 bytes smem
"""


class Program:
    """A compiled TPU program with two kernels, and a fusion that takes more."""

    def as_text(self):
        kernel = 'custom-call(%x), custom_call_target="tpu_custom_call", backend_config={{{}}}'
        size = '"used_scoped_memory_configs":[{{"memory_space":"1","offset":"0","size":"{}"}}]'
        lines = [kernel.format(size.format(n)) for n in (524288, 1188864)]
        return "\n".join([*lines, "fusion(%x), " + size.format(99999999)])


def job(dtype="bfloat16", target="H200", direction=DIRECTIONS[0], name="gated_delta_rule, scalar decay"):
    variant = VARIANTS[name]
    return Job(Case(variant, variant.shapes[0], dtype), direction, target)


def test_figures_are_the_largest_of_a_program():
    figures = kernel_targets.gpu_figures(PTXAS)
    assert figures == {"registers": 255, "spilled": 12, "on_chip": 99328}
    assert kernel_targets.gpu_figures("") == {"registers": None, "spilled": None, "on_chip": None}
    assert kernel_targets.vmem_bytes(Program()) == 1188864


def test_what_a_process_compiled_before_is_asked_of_another():
    """ptxas says nothing of a kernel that it has seen."""
    seen = PTXAS + "Resources(smem_scratch_bytes=1024, tmem_scratch_cols=0)"
    assert "again" not in compile_kernels._finish({"compile_s": 1.0}, PTXAS)
    assert "again" not in compile_kernels._finish({"error": "no"}, seen)
    assert compile_kernels._finish({"compile_s": 1.0}, seen)["again"]
    script = "import sys\nfirst = True\nfor line in sys.stdin:\n    print('{}' if first else "
    script += "'{\"again\": true}', flush=True)\n    first = False"
    told = []
    workers = [kernel_workers.Worker([sys.executable, "-c", script], {})]
    kernel_workers.shared([3, 4, 5], workers, lambda number, answer: told.append((number, answer)))
    assert told == [(3, {}), (4, {}), (5, {})]  # 4 and 5 each by a new process


def test_faults():
    assert compile_kernels.fault(job(), {"compile_s": 1.0, "spilled": 0}) is None
    assert compile_kernels.fault(job(), {"refused": "'gpu' takes heads of at most 128 channels"}) is None
    assert "12 bytes" in compile_kernels.fault(job(), {"spilled": 12})
    assert compile_kernels.fault(job("float32"), {"spilled": 12}) is None
    assert compile_kernels.fault(job(), {"error": "ValueError: no"}) == "ValueError: no"


def test_a_missing_compiler_and_a_refusal_are_told_apart(monkeypatch):
    def raising(text):
        def compiled(*arguments):
            raise ValueError(text)

        return compiled

    monkeypatch.setattr(kernel_targets, "compiled", raising("exceeds shared memory:\n394256 > 232448\nmore"))
    answer = compile_kernels.compile_one(job())
    assert answer == {"error": "ValueError: exceeds shared memory: 394256 > 232448"}
    refusal = "gated_delta_rule: implementation 'gpu' takes heads of at most 128 channels"
    monkeypatch.setattr(kernel_targets, "compiled", raising(refusal))
    assert "takes heads" in compile_kernels.compile_one(job())["refused"]


def test_the_roofline():
    """2 reads of 96 x 128 channels dominate the forward pass; float32 counts its passes."""
    seconds, by = compile_kernels.bound(job())
    case = job().case
    assert by == "memory" and seconds == pytest.approx(case.bytes("forward") / 4.8e12)
    seconds, by = compile_kernels.bound(job("float32", "TPU v5e"))
    assert by == "compute" and seconds == pytest.approx(6 * case.flops("forward") / 197e12)
    assert compile_kernels.bound(job(name="diagonal_scan, real"))[1] == "memory"


def test_every_kernel_is_compiled_in_ci():
    """At every head size; with its backward pass for all targets, and forward alone for some."""
    everything = compile_kernels.jobs()
    usual = [job for job in everything if compile_kernels.usual(job)]

    def kinds(jobs, *, bf16=True):
        chosen = [job for job in jobs if (job.case.dtype == "bfloat16") == bf16]
        return {(job.case.variant.name, job.case.sizes.D, job.target[:3]) for job in chosen}

    def targets(jobs, direction):
        return {(job.case.variant.name, job.target) for job in jobs if job.direction == direction}

    forward, both = DIRECTIONS
    assert targets(usual, both) == targets(everything, both)
    assert {name for name, _ in targets(usual, forward)} == {name for name, _ in targets(everything, forward)}
    assert kinds(usual) == kinds(everything)
    assert {name for name, *_ in kinds(usual, bf16=False)} == {
        name for name, *_ in kinds(everything, bf16=False)
    }
    assert 3 * len(usual) < len(everything)


def test_a_table_is_written_only_on_request(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compile_kernels, "TABLE", tmp_path / "kernels_static")
    monkeypatch.setattr(compile_kernels, "_notes", lambda: ["today"])
    monkeypatch.setattr(compile_kernels, "jobs", lambda: [job(), job(target="TPU v5e")])
    answers = [{"compile_s": 2.0, "registers": 200, "spilled": 8, "on_chip": 4096}, {"compile_s": 1.0}]
    monkeypatch.setattr(compile_kernels, "run", lambda chosen: answers)
    assert compile_kernels.main(["--all"]) == 1 and not list(tmp_path.iterdir())
    assert "2 programs, 1 faults" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compile_kernels.main(["--write"])
    compile_kernels.main(["--all", "--write"])
    with (tmp_path / "kernels_static.csv").open() as stream:
        gpu, tpu = csv.DictReader(stream)
    assert gpu["outcome"] == "spills 8 bytes of registers" and gpu["on_chip_kB"] == "4.096"
    assert tpu["outcome"] == "compiled" and tpu["registers"] == "" and float(tpu["bound_us"]) > 0
    assert timing.kept(tmp_path / "kernels_static", [])[1] == ["today"]
    monkeypatch.setattr(
        compile_kernels, "run", lambda chosen: [{"compile_s": 3.0, "spilled": 0} for _ in chosen]
    )
    assert compile_kernels.main(["--all", "--write", "--targets", "H200"]) == 0
    with (tmp_path / "kernels_static.csv").open() as stream:
        gpu, kept = csv.DictReader(stream)
    assert gpu["outcome"] == "compiled" and gpu["compile_s"] == "3.0" and kept == tpu
    with pytest.raises(SystemExit):
        compile_kernels.main(["--targets", "H300"])
    assert "no target H300; choose from TPU v5e" in capsys.readouterr().err
