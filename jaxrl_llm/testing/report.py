"""What the test kit found, as sentences."""

import dataclasses
from typing import NamedTuple


class Finding(NamedTuple):
    """One property that the loss does not have.

    Attributes:
        check: name of the check, a key of `CHECKS`; pass it in `skip` if the property is not wanted.
        sentence: what was seen, with numbers, and what would mend it.
    """

    check: str
    sentence: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of all checks; `str(report)` is meant to be read, and `report.findings` to be computed with.

    Attributes:
        findings: what is wrong, empty if nothing is.
        passed: names of the checks that held.
        skipped: (name, reason) of the checks that did not apply.
        token_weights: how the loss was found to weigh tokens, for instance "token-mean"; None if it was not found.
    """

    findings: tuple[Finding, ...]
    passed: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    token_weights: str | None = None

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that did not hold, each once."""
        return tuple(dict.fromkeys(finding.check for finding in self.findings))

    def __str__(self):
        lines = [f"{len(self.failed)} checks failed, {len(self.passed)} passed, {len(self.skipped)} skipped."]
        lines += [f"FAILED {check}: {sentence}" for check, sentence in self.findings]
        lines += [f"skipped {check}: {reason}" for check, reason in self.skipped]
        if self.passed:
            lines.append("passed " + ", ".join(self.passed))
        if self.token_weights is not None:
            lines.append(f"tokens are weighted as {self.token_weights}")
        return "\n".join(lines)

    def raise_if_failed(self) -> "Report":
        """This report, if it has no findings.

        Raises:
            AssertionError: with the sentences of all findings.
        """
        if self.findings:
            raise AssertionError(str(self))
        return self
