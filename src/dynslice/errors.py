"""The two ways in which dynslice says no."""


class RequestError(ValueError):
    """A request that cannot be served: names the setting, its value and the mend (exit 2)."""


class RunError(RuntimeError):
    """A failure while running a request that looked sound (exit 1)."""
