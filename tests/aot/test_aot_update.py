"""The whole update step of GLM-4.5's tiny twin compiles for a TPU pod that is not here; its parameters are split."""

import pytest

from experiments.benchmarks.collectives import Collective
from experiments.benchmarks.collectives import collectives
from experiments.benchmarks.large_models import MODELS
from experiments.benchmarks.large_models import compile_update

MODULE = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %one = f32[8,4]{1,0} all-reduce(%x), to_apply=%add
  %two = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%y), dimensions={0}
  %three = bf16[8,4]{1,0} all-gather-done(%two)
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %loop = (s32[], f32[8,4]) while(%init), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %last = f32[2,4]{1,0} reduce-scatter(%z), to_apply=%add
}
"""


def test_collectives_of_a_loop_count_as_often_as_it_runs():
    assert collectives(MODULE) == {
        "all-gather": Collective(3, 3 * 8 * 4 * 2),
        "all-reduce": Collective(3, 3 * 8 * 4 * 4),
        "reduce-scatter": Collective(1, 2 * 4 * 4),
    }


@pytest.mark.aot
@pytest.mark.requires_jax("0.11")
def test_the_tiny_twin_compiles_for_four_chips():
    pytest.importorskip("libtpu", reason="needs libtpu, which `make aot` installs")
    found = compile_update("tiny", "v5p:2x2x1", tokens=256)
    assert found.mesh == {"expert": 4}
    # Parameters in bfloat16, means of Muon in float32 and two of AdamW for the tables, over four chips; the rest of the
    # arguments is less than a megabyte.
    config = MODELS["tiny"]()
    tables = 2 * config.vocab_size * config.hidden_size
    split = (2 * found.parameters + 4 * (found.parameters - tables) + 8 * tables) / 4
    assert split < found.argument_bytes < split + 2**20
    # The state is donated.
    assert found.aliased_bytes > 0.99 * split
    assert found.collectives["all-gather"].count > 0
