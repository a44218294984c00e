"""The agent's log: one event a line on stderr, as key=value or as JSON."""

import sys
from typing import TextIO, cast

import structlog

from installer.agent.kept_log import KeptLog
from installer.settings import Logging


def configure_logging(logging: Logging, kept: KeptLog | None = None) -> None:
    """Set up structlog as the settings say; `kept` keeps the last lines, if given. Times are UTC."""
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
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, kept) if kept else sys.stderr),
        cache_logger_on_first_use=True,
    )
