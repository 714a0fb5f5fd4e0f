"""One rank of the trainer: the loop around the step.

    start -> (resume) -> evaluate -> { groups -> step -> complete -> offer weights -> checkpoint and commit } * -> evaluate -> books

Rank 0 alone talks about steps, versions and commits; every rank fetches its own groups. The ranks decide together, before each step,
whether to go on, because a signal reaches them at different times. A drain finishes the step it is in (or gives it up when the
servers are gone), checkpoints, commits, cancels what is left, and exits 0.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import Counter as Tally
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from areal_like.config import Config
from areal_like.daemon import DrainSignals, configure_logging, exit_code_of
from areal_like.messages.consumer import (
    Books,
    CloseAdmission,
    CommitStep,
    CompleteStep,
    Directory,
    EvalResult,
    GetBooks,
    GetDirectory,
    GetStreamState,
    Group,
    RequestEval,
    StartTraining,
)
from areal_like.paths import RunPaths, model_path
from trainer.broadcaster import Broadcaster
from trainer.link import BufferLink
from trainer.publisher import Publisher, PushReport, Snapshot, take_snapshot
from trainer.report import WARM_UP_STEPS, MetricsFile, write_summary

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 60.0
