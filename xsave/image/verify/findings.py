"""Collect findings: few, each with its place, however broken the image is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from xsave.errors import ImageError
from xsave.image.verify.rules import RULES, SEVERITIES

#: Findings of one rule that are kept one by one; the rest is only counted.
MAX_PER_RULE = 20


@dataclass(frozen=True)
class Finding:
    """One breach of a rule: `severity` is "error", "warning" or "note", `rule` a slug of rules.py,
    `offset` the position in the (decompressed) image."""

    severity: str
    rule: str
    message: str
    record: str | None = None
    offset: int | None = None


class Findings:
    """The findings so far."""

    def __init__(self) -> None:
        self._found: list[Finding] = []
        self._counts: Counter[str] = Counter()

    def add(
        self,
        rule: str,
        message: str,
        *,
        record: str | None = None,
        offset: int | None = None,
        more: int = 0,
    ) -> None:
        """Note a breach of `rule`; `more` tells how many others like it there are."""
        self._counts[rule] += 1
        if self._counts[rule] <= MAX_PER_RULE:
            text = f"{message} (and {more} more like it)" if more else message
            self._found.append(Finding(RULES[rule][0], rule, text, record, offset))

    def add_error(self, rule: str, error: ImageError) -> None:
        """Note what an ImageError says."""
        message = error.what
        if error.expected is not None:
            message += f": expected {error.expected}"
        if error.found is not None:
            message += f"{',' if error.expected is not None else ':'} found {error.found}"
        self.add(rule, message, record=error.record, offset=error.offset)

    def result(self) -> list[Finding]:
        """Return the findings, worst first, each kind in the order of the image."""
        return sorted(map(self._with_rest, self._found, self._is_last()), key=_rank)

    def _is_last(self) -> list[bool]:
        seen: Counter[str] = Counter()
        last = []
        for finding in self._found:
            seen[finding.rule] += 1
            last.append(seen[finding.rule] == MAX_PER_RULE)
        return last

    def _with_rest(self, finding: Finding, is_last: bool) -> Finding:
        rest = self._counts[finding.rule] - MAX_PER_RULE
        if not is_last or rest <= 0:
            return finding
        return replace(finding, message=f"{finding.message} ({rest} more findings of this rule)")


def _rank(finding: Finding) -> tuple[int, bool, int]:
    offset = finding.offset
    return SEVERITIES.index(finding.severity), offset is None, offset or 0
