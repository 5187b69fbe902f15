"""Errors of the gateway: each is the answer that a client gets, in OpenAI's shape.

GatewayError
├── ClientError                 the request is wrong; sending it again would not help
│   ├── UnauthorizedError       401
│   ├── UnknownModelError       404
│   ├── ContextLengthError      400, with the numbers
│   └── UnsupportedFieldError   400, names the field
├── RetryLaterError             nothing is wrong with the request; carries Retry-After
│   ├── QueueFullError          429
│   ├── KeyLimitError           429
│   ├── NoReplicaError          503: no replica serves, and none is on its way
│   ├── QueueDeadlineError      503: the deadline passed while the request waited
│   └── ShuttingDownError       503: this gateway ends
└── ServiceError                the service's fault
    ├── AttemptsExhaustedError  500: replicas were lost or failed again and again
    └── DeadlineError           504: the deadline passed while tokens were being produced

SettingsError is for the person who starts the process, not for clients.
Exceptions of libraries end at the module that calls the library.
"""

from __future__ import annotations


class SettingsError(Exception):
    """A flag or environment variable is wrong; the text is one sentence that names it."""


class GatewayError(Exception):
    """An answer other than the wanted one.

    `status` is the HTTP status; `error_type`, `param` and `code` are the fields of OpenAI's error object;
    `retry_after_s` becomes the header Retry-After when it is not None.
    """

    status = 500
    error_type = "server_error"
    default_code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.status = status if status is not None else self.status
        self.retry_after_s = retry_after_s


class ClientError(GatewayError):
    """The request is wrong."""

    status = 400
    error_type = "invalid_request_error"


class UnauthorizedError(ClientError):
    """The request has no API key, or one that is not known."""

    status = 401
    error_type = "authentication_error"
    default_code = "invalid_api_key"

    def __init__(self, *, given: bool) -> None:
        text = "This API key is not known." if given else "An API key is needed: `Authorization: Bearer KEY`."
        super().__init__(text)


class UnknownModelError(ClientError):
    """No ModelService has this name."""

    status = 404
    default_code = "model_not_found"

    def __init__(self, model: str) -> None:
        super().__init__(f"The model `{model}` does not exist.", param="model")


class ContextLengthError(ClientError):
    """Prompt and output do not fit the model's context."""

    default_code = "context_length_exceeded"


class UnsupportedFieldError(ClientError):
    """A field that would change the meaning of the request is not supported."""

    default_code = "unsupported_parameter"

    def __init__(self, field: str, *, hint: str = "") -> None:
        message = f"`{field}` is not supported by this server."
        super().__init__(f"{message} {hint}".rstrip(), param=field)


class RetryLaterError(GatewayError):
    """Nothing is wrong with the request."""

    status = 503
    error_type = "server_error"
    default_retry_after_s = 5

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_s=self.default_retry_after_s)


class QueueFullError(RetryLaterError):
    """As many requests wait as may wait."""

    status = 429
    error_type = "rate_limit_error"
    default_code = "queue_full"
    default_retry_after_s = 1


class KeyLimitError(RetryLaterError):
    """An API key has as many requests as it may have."""

    status = 429
    error_type = "rate_limit_error"
    default_code = "rate_limit_exceeded"

    def __init__(self, name: str, *, retry_after_s: int) -> None:
        super().__init__(f"The API key {name} has reached its limit of requests.")
        self.retry_after_s = retry_after_s


class NoReplicaError(RetryLaterError):
    """No replica serves the model and none is on its way."""

    default_code = "no_replica"


class QueueDeadlineError(RetryLaterError):
    """The request waited until its deadline without a first token."""

    default_code = "queue_deadline_exceeded"


class ShuttingDownError(RetryLaterError):
    """This gateway is ending; another one, or the next one, will serve."""

    default_code = "shutting_down"
    default_retry_after_s = 1


class ServiceError(GatewayError):
    """The service's fault."""


class AttemptsExhaustedError(ServiceError):
    """Every attempt was lost with its replica or failed there."""

    default_code = "attempts_exhausted"


class DeadlineError(ServiceError):
    """The deadline passed while tokens were being produced."""

    status = 504
    default_code = "deadline_exceeded"
