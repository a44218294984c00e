"""The agent's log: one event a line on stderr, as key=value or as JSON."""

import sys

import structlog

from installer.settings import Logging


def configure_logging(logging: Logging) -> None:
    """Set up structlog as the settings say. Times are UTC."""
    keys = ["timestamp", "level", "event"]
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer()
            if logging.log_as_json
            else structlog.processors.LogfmtRenderer(key_order=keys),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.log_level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
