# Pallas passes references where its stubs say arrays.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportAbstractUsage=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
"""Tiles of logits on a Hopper GPU: products on the tensor cores, handed to what is made of them while they are in
registers.

A thread block holds two warpgroups that compute and one that copies. The computing ones share a tile of 128 rows by 256
columns (64 rows each; with a reference 128 columns of both heads), summed over the width in steps of 64; the copying
one keeps a ring of such steps filled by TMA, also across tiles, so that the next product is loading while a tile's sums
are taken. Two blocks with neighbouring rows form a cluster and load each part of the head once for both. Every block
sweeps one segment of the vocabulary.

What lies outside the arrays is read as zero, and columns beyond the vocabulary get a logit that no weight survives. A
slot of the ring is full when both copies into it arrived, and empty when both computing warpgroups of both blocks of
the cluster have read it, since either block's copy writes into both.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxrl_kernels._token_statistics.elementary import across
from jaxrl_kernels._token_statistics.streaming import NOTHING

ROWS = 64
"""Rows of a computing warpgroup: those of one tensor core instruction."""

GROUPS = 2
"""Computing warpgroups of a block; one more copies."""

CLUSTER = 2
"""Blocks that share what they load of the head."""

STEP = 64
"""Width of a step: 128 bytes of bfloat16, the swizzle that is read without bank conflicts."""

TILES = {1: (256, 4), 2: (128, 6)}
"""Per number of heads: columns of a tile and steps in flight. 128 accumulator registers a thread and 192 KiB of shared
memory either way."""

PROCESSORS = 132
"""Multiprocessors that the vocabulary is cut into segments for (H100 SXM)."""

TOGETHER = 8
"""Clusters of rows that run side by side: their hidden states, 16 MB at D = 4096, stay in the L2 cache."""

SHORTEST = 8
"""Tiles of a segment at least, so that what the segments write stays below 2 % of the logits."""

SWIZZLED = plgpu.TilingTransform((8, STEP)), plgpu.SwizzleTransform(2 * STEP)
"""How bfloat16 lies in shared memory: read without bank conflicts by the tensor cores and the copies."""


class Head(NamedTuple):
    """One product of the kernel: arrays outside, references inside. The parts of float32 lie side by side along D."""

    hidden: Any  # [N, parts D]
    head: Any  # [parts D, V] or [V, parts D]


def padded_rows(count: int) -> int:
    """Rows of all clusters that `count` rows take."""
    together = CLUSTER * GROUPS * ROWS
    return math.ceil(count / together) * together


class Part(NamedTuple):
    """What a computing warpgroup works on."""

    row: Any  # its first row
    segment: Any
    first: Any  # tile of the segment
    last: Any  # tile after the segment
    targets: Any  # [ROWS]
    rows: Any  # constants of its rows, as the tree that was given
    logits: Callable  # (tile, steps used so far) -> (steps used so far, slices), see `_logits`


class Case(NamedTuple):
    """Static description of one kernel call."""

    axis: int
    vocabulary: int
    count: int  # rows
    widths: tuple[int, ...]  # of one part, per head
    products: tuple[tuple[int, int], ...]
    soft_cap: float | None

    @property
    def columns(self) -> int:
        """Columns of a tile."""
        return TILES[len(self.widths)][0]

    @property
    def stages(self) -> int:
        """Steps in flight."""
        return TILES[len(self.widths)][1]

    @property
    def tiles(self) -> int:
        """Tiles side by side."""
        return math.ceil(self.vocabulary / self.columns)

    @property
    def clusters(self) -> int:
        """Clusters one above the other."""
        return self.padded // (CLUSTER * GROUPS * ROWS)

    @property
    def padded(self) -> int:
        """Rows of all clusters."""
        return padded_rows(self.count)

    @property
    def segments(self) -> int:
        """Segments of the vocabulary: as many as should leave the fewest processors idle."""

        def rounds(segments: int) -> float:
            waves = math.ceil(self.clusters * segments / (PROCESSORS // CLUSTER))
            return waves * (math.ceil(self.tiles / segments) + 0.1)

        return min(range(1, max(1, self.tiles // SHORTEST) + 1), key=rounds)

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps along the width per head and tile, all products together."""
        return tuple(math.ceil(width / STEP) * len(self.products) for width in self.widths)


def _kernel(case: Case, rows: Any, work: Callable) -> Callable:
    """The kernel's body; `work` is what the computing warpgroups do (`sweep` and `gradient` bring theirs).

    work(part, out, kept), where part is a Part.
    """

    def body(*refs) -> None:
        heads = [Head(*refs[2 * k : 2 * k + 2]) for k in range(len(case.widths))]
        targets, constants, out, ring, kept, staged, full, empty, ready = refs[2 * len(heads) :]
        block, segment = place(case, lax.axis_index("item"))
        first, last = (lax.div((segment + k) * case.tiles, case.segments) for k in (0, 1))
        row = (block * CLUSTER + lax.axis_index("cluster")) * (GROUPS * ROWS)
        group = lax.axis_index("group")

        @pl.when(group == GROUPS)
        def _copy() -> None:
            plgpu.set_max_registers(40, action="decrease")
            given = pl.ds(row, GROUPS * ROWS)
            plgpu.copy_gmem_to_smem(targets.at[given], kept[0], ready)
            plgpu.copy_gmem_to_smem(constants.at[:, given], kept[1], ready)
            _fill(case, heads, ring, full, empty, row, first, last)

        @pl.when(group < GROUPS)
        def _compute() -> None:
            plgpu.set_max_registers(232, action="increase")
            plgpu.barrier_wait(ready)
            mine, wide = pl.ds(group * ROWS, ROWS), plgpu.Layout.WGMMA.reduce(1)
            own_targets = plgpu.load(kept[0].at[mine], layout=wide)
            leaves, structure = jax.tree.flatten(rows)
            given = [plgpu.load(kept[1].at[k, mine], layout=wide) for k in range(len(leaves))]
            given = jax.tree.unflatten(structure, given)
            logits = partial(_logits, case, given.get("inverse"), ring, full, empty)
            work(Part(row + group * ROWS, segment, first, last, own_targets, given, logits), out, staged.at[group])
            plgpu.wait_smem_to_gmem(0)

    return body


def place(case: Case, item: Array) -> tuple[Array, Array]:
    """(cluster of rows, segment) of the item-th cluster: TOGETHER clusters of rows, then the next segment."""
    height = min(TOGETHER, case.clusters)
    band = lax.div(item, height * case.segments)
    inside = item - band * (height * case.segments)
    here = lax.min(height, case.clusters - band * height)
    segment = lax.div(inside, here)
    return band * height + (inside - segment * here), segment


def _part_of(case: Case, which: int, product: Array) -> Array | int:
    """Part of the hidden states (0) or of the head (1) in the given product; two bits each of a number known
    beforehand, as a kernel has no tables."""
    if len(case.products) == 1:
        return 0
    packed = sum(parts[which] << (2 * k) for k, parts in enumerate(case.products))
    return lax.bitwise_and(lax.shift_right_logical(jnp.int32(packed), 2 * product), jnp.int32(3))


def _fill(case: Case, heads: list[Head], ring, full, empty, row, first, last) -> None:
    """Keep the ring filled, step after step and tile after tile."""

    def fill_tile(j: Array, count: Array) -> Array:
        columns = pl.ds(j * case.columns, case.columns)
        for (hidden, head), width, steps in zip(heads, case.widths, case.steps, strict=True):
            deep = math.ceil(width / STEP)

            def step(k, count, hidden=hidden, head=head, deep=deep):
                slot, product = lax.rem(count, case.stages), lax.div(k, deep)
                at, head_at = (
                    pl.ds((k + (_part_of(case, which, product) - product) * deep) * STEP, STEP) for which in (0, 1)
                )

                @pl.when(count >= case.stages)
                def _free() -> None:
                    plgpu.barrier_wait(empty.at[slot])

                source = hidden.at[pl.ds(row, GROUPS * ROWS), at]
                plgpu.copy_gmem_to_smem(source, ring[0].at[slot], full.at[slot])
                source = head.at[head_at, columns] if case.axis == 1 else head.at[columns, head_at]
                plgpu.copy_gmem_to_smem(source, ring[1].at[slot], full.at[slot], collective_axes="cluster")
                return count + 1

            # A loop known to have eight steps would be unrolled, and then the copying warpgroup spills registers. The
            # compiler does not know that no count of steps reaches 2^30.
            count = lax.fori_loop(0, steps + lax.shift_right_logical(count, jnp.int32(30)), step, count)
        return count

    count = lax.fori_loop(first, last, fill_tile, jnp.int32(0))

    # A block must not end while its neighbour may still signal to it.
    def drained(step: Array, _) -> None:
        plgpu.barrier_wait(empty.at[lax.rem(step, case.stages)])

    lax.fori_loop(lax.max(count - case.stages, 0), count, drained, None)


def _product(case: Case, steps: int, count: Array, ring, full, empty) -> Array:
    """The next `steps` steps of the ring, summed: 64 rows of one head's logits."""
    mine = pl.ds(lax.axis_index("group") * ROWS, ROWS)

    def release(step: Array) -> None:
        plgpu.barrier_arrive(empty.at[lax.rem(step, case.stages)])

    def multiply(accumulator):
        def step(k: Array, _) -> None:
            slot = lax.rem(count + k, case.stages)
            plgpu.barrier_wait(full.at[slot])
            head = ring[1].at[slot]
            plgpu.wgmma(accumulator, ring[0].at[slot, mine], head if case.axis == 1 else head.T)
            # One product stays in flight, so the step before this one has been read.
            plgpu.wgmma_wait(1)
            pl.when(k > 0)(lambda: release(count + k - 1))

        lax.fori_loop(0, steps, step, None)
        z = accumulator[...]
        release(count + steps - 1)
        return z

    return pl.run_scoped(multiply, plgpu.ACC((ROWS, case.columns), jnp.float32))


def _logits(case: Case, inverse: Array | None, ring, full, empty, j: Array, count: Array):
    """(steps of the ring used so far, slices of tile j): slices(at, wide) gives the logits [ROWS, wide] of policy and
    reference (or None) from column `at` of the tile on."""
    blocks = []
    for steps in case.steps:
        blocks.append(_product(case, steps, count, ring, full, empty))
        count = count + steps

    def scaled(block: Array, at: int, wide: int) -> Array:
        z = lax.slice(block, (0, at), (ROWS, at + wide))
        if case.soft_cap is not None:
            # tanh, to a rounding of the cap; the GPU's own spills registers, its fast one errs by 2^-11.
            z = case.soft_cap - 2 * case.soft_cap / (jnp.exp(z * (2 / case.soft_cap)) + 1)
        z = z if inverse is None else z * across(inverse, z)
        if case.vocabulary % case.columns == 0:
            return z
        beyond = lax.broadcasted_iota(jnp.int32, z.shape, 1) >= case.vocabulary - (j * case.columns + at)
        return jnp.where(beyond, jnp.full_like(z, NOTHING), z)

    def slices(at: int, wide: int) -> tuple[Array, Array | None]:
        found = [scaled(block, at, wide) for block in blocks]
        return found[0], found[1] if found[1:] else None

    return count, slices


def launch(
    case: Case, heads: list[Head], targets: Array, rows: Any, work: Callable, out: Any, staged: Any, name: str
) -> Array:
    """Run the kernel: `out` is the shape of its result, `staged` a warpgroup's own shared memory."""
    leaves, missing = jax.tree.leaves(rows), case.padded - case.count
    constants = jnp.stack(leaves or [jnp.zeros((case.count,), jnp.float32)])
    arrays = (*(x for pair in heads for x in pair), jnp.pad(targets, (0, missing)))
    arrays = (*arrays, jnp.pad(constants, ((0, 0), (0, missing))))
    of_head = (STEP, case.columns) if case.axis == 1 else (case.columns, STEP)
    ring = [
        plgpu.SMEM((case.stages, *shape), jnp.bfloat16, transforms=SWIZZLED)
        for shape in ((GROUPS * ROWS, STEP), of_head)
    ]
    kept = [
        plgpu.SMEM((GROUPS * ROWS,), jnp.int32),
        plgpu.SMEM((constants.shape[0], GROUPS * ROWS), jnp.float32),
    ]
    full = plgpu.Barrier(num_arrivals=2, num_barriers=case.stages)
    empty = plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=GROUPS, num_barriers=case.stages)
    varying = jax.typeof(arrays[0]).manual_axis_type
    return plgpu.kernel(
        _kernel(case, rows, work),
        out_type=jax.ShapeDtypeStruct(out.shape, out.dtype, manual_axis_type=varying),
        scratch_types=[ring, kept, staged, full, empty, plgpu.Barrier(num_arrivals=2)],
        grid=(case.clusters * case.segments,),
        grid_names=("item",),
        cluster=(CLUSTER,),
        cluster_names=("cluster",),
        num_threads=GROUPS + 1,
        thread_name="group",
        # The only function of the kernel is exp, whose fast form (ex2.approx) is right to 2^-22 by PTX's manual.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name=f"token_statistics_{name}",
    )(*arrays)
