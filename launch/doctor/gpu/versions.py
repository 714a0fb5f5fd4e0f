"""Stage `versions`: driver, torch, transformers, NCCL and SGLang, from the metadata of both environments."""

from __future__ import annotations

import os
import sys

from launch.doctor.checks import GpuFacts, Level, check_versions
from launch.doctor.gathering import driver_table, gpus_from, versions_of
from launch.doctor.gpu.stages import OK, Notes, Request, Verdict, failed


def check(request: Request, notes: Notes) -> Verdict:
    """Reports the versions; fails at the first that is not supported, or does not fit another."""
    notes.at("reading the packages of the environments")
    versions = [versions_of("trainer", sys.executable)]
    if request.sglang:
        versions.append(versions_of("engine", request.sglang))
    for each in versions:
        prefix = "" if each.of == "trainer" else "sglang_"
        found = {"torch": each.torch, "cuda": each.cuda, "nccl": each.nccl, "transformers": each.transformers}
        notes.measured(**{f"{prefix}{name}": value for name, value in found.items() if value})
        if each.sglang:
            notes.measured(sglang=each.sglang)
    facts = GpuFacts()
    if request.device == "cuda":
        notes.at("nvidia-smi")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        facts = gpus_from(driver_table()[0], wanted={0: "this check"}, visible=visible, may_share=True)
        notes.measured(driver=facts.driver)
    for finding in check_versions(versions, facts):
        if finding.level is Level.ERROR:
            return failed(f"{finding.what}: {finding.found}", finding.remedy)
    return OK
