"""The bench's bookkeeping: what counts as missed, the nearest tuned block, the table, and programs that do the same
work."""

import json
import sys

import jax
import numpy as np
import pytest

from jaxrl_kernels import tuned
from jaxrl_kernels.bench import accuracy
from jaxrl_kernels.bench import cases
from jaxrl_kernels.bench import dense
from jaxrl_kernels.bench import gpu
from jaxrl_kernels.bench import grouped
from jaxrl_kernels.bench import roofline
from jaxrl_kernels.bench import table
from jaxrl_kernels.bench import targets
from tests.kernels.head_oracle import error


def results(forward=1.0, temporaries=1.0, share=0.9, gradient_error=1e-7, low=1e-6):
    """A run in which every promise is kept, unless told otherwise."""
    programs = {
        "forward/naive": {"cpu_seconds": 4.0, "temporaries_mib": 1000.0},
        "forward/token_statistics": {"cpu_seconds": forward, "temporaries_mib": 1.0},
        "gradient/naive": {"cpu_seconds": 4.0, "temporaries_mib": 1000.0},
        "gradient/token_statistics": {"cpu_seconds": 2.0, "temporaries_mib": temporaries},
        "gradient/token_loss": {"cpu_seconds": 2.0, "temporaries_mib": 100.0},
    }
    shape = {
        "programs": {name: {**value, "cpu_seconds_range": [1.0, 2.0]} for name, value in programs.items()},
        "forward_share_of_product_rate": share,
        "errors": {"hidden_gradient": gradient_error},
    }
    return {
        "device": "a device", "jax": "0", "rounds": 5, "shapes": {targets.SMALL: shape},
        "bfloat16_log_prob_errors": {"30.0": low},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"forward": float("nan")}, "forward/token_statistics takes nan of forward/naive"),
        ({"temporaries": float("nan")}, "gradient/token_statistics needs nan of the temporaries"),
        ({"share": float("nan")}, "the forward sweep reaches nan of the product rate"),
        ({"forward": 1.7}, "forward/token_statistics takes 0.42 of forward/naive, more than 0.4"),
        ({"temporaries": 11.0}, "gradient/token_statistics needs 0.0110 of the temporaries"),
        ({"share": 0.7}, "the forward sweep reaches 0.7 of the product rate, not 0.85"),
        ({"gradient_error": float("nan")}, "error of hidden_gradient is nan"),
        ({"low": 3e-5}, "bfloat16 inputs at scale 30.0: error of log_prob is 3e-05"),
    ],
)
def test_a_missed_promise_is_named(change, sentence):
    assert targets.misses(results()) == []
    found = targets.misses(results(**change))
    assert len(found) == 1
    assert sentence in found[0]


def test_promises_that_were_not_measured_are_listed():
    missing = targets.unmeasured(results())
    assert len(missing) == len(targets.TARGETS) - 3
    assert f"{targets.SMALL}: gradient/token_loss against gradient/torch eager" in missing
    assert not any("against gradient/naive" in sentence for sentence in missing if targets.SMALL in sentence)


def test_roofline_counts_work_and_bytes():
    """Two heads of 4 x (2 + 8) bytes and twice 1 MiB of temporaries move; two products of 32 flop are done."""
    programs = {
        "product": {"temporaries_mib": 0.0, "gflop_per_cpu_second": 9.0},
        "forward/naive": {"temporaries_mib": 1.0, "gflop_per_cpu_second": 3.0},
        "gradient/torch eager": {},
    }
    product, naive = roofline.points("N2_D1_V8_float32", programs)
    assert product == ("product", 32 / 40, 9.0)
    assert naive == ("forward/naive", 64 / (80 + 2**21), 3.0)
    copied = {"programs": {"copy": {"gb_per_cpu_second": 0.5}}}
    run = {"device": "a device", "shapes": {"N2_D1_V8_float32": {"programs": programs}, "N2_V8_float32": copied}}
    (axes,) = roofline.draw(run, "N2_D1_V8_float32").axes
    flat, slanted = (line.get_xydata().tolist() for line in axes.lines[:2])
    assert {y for _, y in flat} == {9.0}
    assert slanted[0][1] == 0.5 * slanted[0][0]


def test_table_names_the_device_and_the_ratios():
    text = table.markdown(results())
    assert text.startswith("a device, jax 0, median of 5")
    assert "| forward/token_statistics | 1.00 (1.00 to 2.00) | 1.0 | - | 0.25 | 0.0010 |" in text


def test_nearest_tuned_block():
    found = tuple(
        dict(zip(("op", "rows", "width", "vocabulary", "dtype", "block"), ("token_statistics", *entry), strict=True))
        for entry in (
            (2048, 576, 49152, "float32", 256), (256, 576, 49152, "float32", 1024), (2048, 576, 151552, "float32", 512),
            (2048, 1536, 49152, "float32", 128), (2048, 576, 49152, "bfloat16", 2048),
        )
    )  # fmt: skip
    assert tuned.nearest(found, "token_statistics", 2048, 576, 49152, "float32") == 256
    assert tuned.nearest(found, "token_statistics", 300, 576, 50257, "float32") == 1024
    assert tuned.nearest(found, "token_statistics", 1500, 576, 128000, "float32") == 512
    assert tuned.nearest(found, "token_statistics", 8, 576, 301, "float32") is None
    assert tuned.nearest(found, "token_loss", 2048, 576, 49152, "float32") is None
    assert tuned.nearest(found, "token_statistics", 2048, 1024, 49152, "float32") == 128
    assert tuned.nearest(found, "token_statistics", 2048, 8192, 49152, "float32") is None
    assert tuned.nearest(found, "token_statistics", 2048, 576, 49152, "bfloat16") == 2048
    assert tuned.nearest(found, "token_statistics", 2048, 576, 49152, "float16") is None
    assert tuned.entries("a device that nobody has") == ()


def test_tuned_files_are_complete():
    for path in tuned.FOLDER.glob("*.json"):
        data = json.loads(path.read_text())
        assert tuned.slug(data["device"]) == path.stem
        for entry in data["entries"]:
            assert entry["op"] in ("token_statistics", "token_loss")
            assert min(entry["rows"], entry["width"], entry["vocabulary"], entry["block"]) >= 1
            assert entry["dtype"] in ("bfloat16", "float32")


def test_bfloat16_log_probs():
    """At logits of standard deviation 30 as at 0.1, for targets that the policy would draw."""
    found = accuracy.bfloat16_log_prob_errors("xla")
    assert set(found) == {str(scale) for scale in accuracy.SCALES}
    assert max(found.values()) <= targets.BFLOAT16_ERROR


def test_timed_programs_compute_the_same():
    """What is compared in time is equal in value."""
    inputs = cases.make_inputs(cases.Shape(6, 16, 512, "float32"))
    naive, op, tile = (
        jax.jit(cases.PROGRAMS[f"gradient/{name}"])(inputs) for name in ("naive", "token_statistics", "token_loss")
    )
    for one, other, third in zip(naive[1], op[1], tile[1], strict=True):
        assert error(one, other) < 2e-5
        assert error(one, third) < 2e-5
    np.testing.assert_allclose(naive[0][0], tile[0], rtol=1e-4)
    logits = dense.make_inputs(cases.Shape(6, 0, 512, "float32"))
    slopes = [jax.jit(dense.PROGRAMS[f"dense/{name}"])(logits)[1] for name in ("naive", "dense_kl", "dense_gradient")]
    assert max(error(slopes[0], slope) for slope in slopes[1:]) < 2e-5


def test_timed_layers_of_experts_compute_the_same():
    """With equal groups the op makes the products that it is timed against; the layer is a sum over chosen experts."""
    shape = grouped.GroupedShape(8, 2, 6, 4, 4, "float32")
    inputs = grouped.make_inputs(shape)
    assert inputs.sizes.sum() == 16
    assert max(grouped.errors(inputs, jax.jit(grouped.op)(inputs)).values()) < 1e-6
    equal = inputs._replace(sizes=np.full(4, 4, np.int32))
    for one, other in zip(jax.jit(grouped.op)(equal), jax.jit(grouped.products)(inputs), strict=True):
        assert error(one, np.reshape(other, one.shape)) < 1e-6
    tokens, router, gate, up, down = (np.asarray(x, np.float64) for x in inputs[:5])
    scores = 1 / (1 + np.exp(-tokens @ router))
    chosen = scores >= np.sort(scores, axis=1)[:, -2:-1]
    inner = np.einsum("td,edf->tef", tokens, gate)
    inner = inner / (1 + np.exp(-inner)) * np.einsum("td,edf->tef", tokens, up)
    wanted = np.einsum("tef,efd,te->td", inner, down, scores * chosen)
    assert error(jax.jit(grouped.layer)(inputs)[0], wanted) < 1e-5


def test_gpu_bench_times_programs_that_compute_the_same(monkeypatch, tmp_path, capsys):
    """Tiny, on the CPU: every program runs, the shares are those of the rates, and what failed is said."""
    size, output = (16, 8, 64), tmp_path / "gpu.json"
    words = ["gpu", "--size", *map(str, size), "--implementations", "xla", "--rounds", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*words, "--torch", sys.executable])
    monkeypatch.setattr(gpu, "SETS", {"log_prob+entropy": gpu.TWO})
    gpu.main()
    found = json.loads(output.read_text())
    printed = capsys.readouterr().out
    assert found["log_prob_error"]["xla"] < 1e-5
    assert "not measured" in found["peers"]["PyTorch"]
    for part, ceiling in (("programs", "matrix product"), ("dense", "two reads and a write")):
        assert found[part][ceiling]["of_the_ceiling"] == 1
        for name, entry in found[part].items():
            assert f"| {name} |" in printed
            assert entry["range"][0] <= entry["milliseconds"] <= entry["range"][1]
    inputs = gpu.make_inputs(size)
    entries = gpu.programs(["xla"], size)
    for kind in ("forward", "full"):
        values = [entries[f"{name} {kind} log_prob+entropy"].program(inputs) for name in ("xla", "naive")]
        for value, right in zip(*values, strict=True):
            assert error(value.astype(float), right.astype(float)) < 2e-2
    (loss, gradient), right = entries["token_loss full log_prob+entropy"].program(inputs), values[0]
    assert error(loss, sum(x.sum() for x in entries["xla forward log_prob+entropy"].program(inputs))) < 1e-5
    assert all(error(a.astype(float), b.astype(float)) < 2e-2 for a, b in zip(gradient, right, strict=True))
