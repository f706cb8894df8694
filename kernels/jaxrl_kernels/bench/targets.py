"""What the project promises on two CPU cores, and how a measured table is held against it."""

from dataclasses import dataclass

BAND = 1.05
"""Ratios of medians are reproducible to about 5 %."""


@dataclass(frozen=True)
class Target:
    """`program` of `shape` against `against`: largest ratio of CPU time, and of temporaries if promised."""

    shape: str
    program: str
    against: str
    time: float
    temporaries: float | None = None


SMALL, LARGE = "N2048_D576_V49152_float32", "N1024_D1024_V151552_float32"

TARGETS = (
    Target(SMALL, "gradient/token_statistics", "gradient/naive", 0.80, 1 / 100),
    Target(SMALL, "gradient/token_loss", "gradient/naive", 0.60, 1 / 8),
    Target(SMALL, "forward/token_statistics", "forward/naive", 0.40),
    Target(LARGE, "gradient/token_statistics", "gradient/naive", 1.00, 1 / 100),
    Target(LARGE, "gradient/token_loss", "gradient/naive", 0.86, 1 / 3),
    Target(LARGE, "forward/token_statistics", "forward/naive", 0.40),
    Target(SMALL, "gradient/token_statistics", "gradient/torch eager", 0.40),
    Target(SMALL, "gradient/token_loss", "gradient/torch eager", 0.31),
    Target("N2048_V49152_float32", "dense/dense_gradient", "dense/naive", 0.25),
    Target("T4096_k4_D256_F128_E32_float32", "grouped/grouped_matmul", "grouped/products", 1.30),
    Target("T1024_k4_D1024_F512_E16_float32", "grouped/grouped_matmul", "grouped/products", 1.30),
)

RATE = 0.85
"""Share of the matrix-product rate, measured in the same run, that the forward sweep must reach."""

ERRORS = {"log_prob": 2e-5, "entropy": 1e-5, "collision": 1e-5, "kl": 1e-5, "product": 1e-6}
ERRORS |= {"hidden_gradient": 1e-5, "gradient": 1e-5}
"""Largest errors for float32 inputs: log_prob in nats, the others relative."""


BFLOAT16_ERROR = 2e-5
"""Largest error of log_prob [nats] for bfloat16 inputs, at logits of standard deviation up to 30."""


def _programs(results: dict, target: Target) -> dict | None:
    """Both programs of a target, if they were measured."""
    table = results["shapes"].get(target.shape, {}).get("programs", {})
    return table if {target.program, target.against} <= set(table) else None


def unmeasured(results: dict) -> list[str]:
    """One sentence per promise that the results say nothing about."""
    return [
        f"{target.shape}: {target.program} against {target.against}"
        for target in TARGETS
        if _programs(results, target) is None
    ]


def misses(results: dict) -> list[str]:
    """One sentence per promise that the results do not keep; those that were not measured are passed over."""
    found = []
    for target in TARGETS:
        table = _programs(results, target)
        if table is not None:
            found += _compare(target, table[target.program], table[target.against])
    found += [
        f"bfloat16 inputs at scale {scale}: error of log_prob is {value}, more than {BFLOAT16_ERROR}"
        for scale, value in results.get("bfloat16_log_prob_errors", {}).items()
        if not value <= BFLOAT16_ERROR
    ]
    for name, shape in results["shapes"].items():
        if not name.endswith("float32"):
            continue
        if "forward_share_of_product_rate" in shape and not shape["forward_share_of_product_rate"] * BAND >= RATE:
            share = shape["forward_share_of_product_rate"]
            found.append(f"{name}: the forward sweep reaches {share} of the product rate, not {RATE}")
        found += [
            f"{name}: error of {key} is {value}, more than {ERRORS[key]}"
            for key, value in shape["errors"].items()
            if not value <= ERRORS[key]
        ]
    return found


def _compare(target: Target, measured: dict, against: dict) -> list[str]:
    found = []
    ratio = measured["cpu_seconds"] / against["cpu_seconds"]
    if not ratio <= target.time * BAND:
        found.append(f"{target.shape}: {target.program} takes {ratio:.2f} of {target.against}, more than {target.time}")
    if target.temporaries is not None:
        memory = measured["temporaries_mib"] / against["temporaries_mib"]
        if not memory <= target.temporaries:
            found.append(
                f"{target.shape}: {target.program} needs {memory:.4f} of the temporaries of {target.against}, "
                f"more than {target.temporaries:.4f}"
            )
    return found
