"""Errors of the operator: whose fault, and whether to try again.

OperatorError
├── SettingsError        the person who started the process: a flag, a port in use
├── ModelServiceError    the author of a ModelService; names file and field
├── ClusterFileError     the author of cluster.json
├── AgentCallError       a node: says which, with the gRPC code; `code` decides what comes next
├── KubernetesError      the API server: refused (`code`), or away (0: try again)
└── PrometheusError      Prometheus is away, or an expression is wrong (`ours`)

Exceptions of libraries end at the adapter that calls the library.
"""

from __future__ import annotations


class OperatorError(Exception):
    """Base of all; its text is a sentence for a person's eyes."""


class SettingsError(OperatorError):
    """The process cannot start as it was asked to."""


class ModelServiceError(OperatorError):
    """A ModelService cannot be used; trying again helps only after an edit.

    `file` and `field` say where and are part of the text.
    """

    def __init__(self, problem: str, *, file: str, field: str = "") -> None:
        place = f"{file}: {field}" if field else file
        super().__init__(f"{place}: {problem}")
        self.file = file
        self.field = field


class ClusterFileError(OperatorError):
    """cluster.json cannot be used; the last good one stays in force."""


class AgentCallError(OperatorError):
    """An agent refused or did not answer.

    `code` is the name of the gRPC status, e.g. `RESOURCE_EXHAUSTED`.
    """

    def __init__(self, problem: str, *, node: str, code: str) -> None:
        super().__init__(f"{node}: {problem} ({code})")
        self.node = node
        self.code = code


class KubernetesError(OperatorError):
    """The API server refused or did not answer.

    `code` is the HTTP status; 0 when there was no answer, then trying again is right.
    """

    def __init__(self, problem: str, *, code: int) -> None:
        super().__init__(f"{problem} ({code})" if code else problem)
        self.code = code


class PrometheusError(OperatorError):
    """Prometheus did not answer, or refused an expression.

    `ours` is True when the expression is at fault: asking again gives the same.
    """

    def __init__(self, problem: str, *, ours: bool) -> None:
        super().__init__(problem)
        self.ours = ours
