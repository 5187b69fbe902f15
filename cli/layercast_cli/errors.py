"""Errors of the command line: each ends the program with one clear sentence.

CliError            what was asked could not be done now           exit 1
├── UsageError      the command, file or setting is wrong          exit 2
└── ClusterError    a process of the local cluster is in trouble   exit 1
"""

from __future__ import annotations


class CliError(Exception):
    """Base of all; its text is the sentence that the user reads."""

    exit_code = 1


class UsageError(CliError):
    """Trying again without changing the command or the file would not help."""

    exit_code = 2


class ClusterError(CliError):
    """A local process does not start, or the cluster does not get where it should in time."""
