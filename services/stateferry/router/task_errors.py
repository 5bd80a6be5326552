"""What went wrong in a group of tasks."""

from __future__ import annotations


def root_cause(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a task group: what followed is mostly its consequence."""
    first = errors.exceptions[0]
    return root_cause(first) if isinstance(first, BaseExceptionGroup) else first
