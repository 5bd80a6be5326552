"""The table for people, and RESULT for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from bench.gpu.bench_rows import GRID_FORM
from bench.gpu.rows import OURS, Row

# RESULT key -> the least it must show; an upper limit where it is a cost.
TARGETS = {
    "chunk_scan_vs_mamba_ssm": 1.5,
    "chunk_scan_vs_best_peer": 1.1,
    "state_update_vs_copy": 0.85,
    "state_update_vs_best_peer": 1.05,
    "verify_t4_vs_state_per_token": 2.0,
}
SNAPSHOT_COST = 0.05


def table(rows: Sequence[Row]) -> str:
    lines = [
        f"{'operation':<11}{'shape':<21}{'case':<33}{'who':<26}{'us':>10}{'faster':>8}{'floor':>7}"
    ]
    previous: tuple[str, ...] = ()
    for row in rows:
        here = (row.operation, row.shape, row.case)
        shown = here if here != previous else ("", "", "")
        previous = here
        speedup = "" if row.speedup is None else f"{row.speedup:.2f}x"
        share = "" if row.share is None else f"{row.share:.0%}"
        lines.append(
            f"{shown[0]:<11}{shown[1]:<21}{shown[2]:<33}{row.contender:<26}"
            f"{row.us:>10,.1f}{speedup:>8}{share:>7}"
        )
    return "\n".join(lines)


def result_of(rows: Sequence[Row], ceilings: dict[str, float]) -> dict[str, Any]:
    result: dict[str, Any] = {key: {} for key in TARGETS} | {
        "snapshots_cost": {},
        "grid_form_vs_step": {},
        "grid_form_vs_floor": {},
    }
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.operation, row.shape, row.case), {})[row.contender] = row
    for (operation, shape, case), by_name in cases.items():
        key = f"{shape}, {case}"
        peers = {n: r.us for n, r in by_name.items() if n in ("mamba_ssm", "vllm", "sglang")}
        ours = by_name.get(OURS)
        if operation == "chunk scan" and ours is not None:
            if "mamba_ssm" in peers:
                result["chunk_scan_vs_mamba_ssm"][key] = peers["mamba_ssm"] / ours.us
            if peers:
                result["chunk_scan_vs_best_peer"][key] = min(peers.values()) / ours.us
        elif operation == "snapshots":
            none, every = by_name[f"{OURS}, none"].us, by_name[f"{OURS}, every"].us
            result["snapshots_cost"][key] = every / none - 1
        elif operation == "decode" and ours is not None:
            grid_form = by_name[GRID_FORM]
            result["grid_form_vs_step"][key] = ours.us / grid_form.us
            result["grid_form_vs_floor"][key] = grid_form.share
            if int(case.split()[1].strip(",")) >= 64 and ours.share is not None:
                of_copy = ours.share * ceilings["update_tbs"] / ceilings["copy_tbs"]
                result["state_update_vs_copy"][key] = of_copy
                if peers:
                    result["state_update_vs_best_peer"][key] = min(peers.values()) / ours.us
        elif operation == "verify" and "T=4" in case:
            kept = by_name["a state per token (ours)"].us
            result["verify_t4_vs_state_per_token"][key] = kept / by_name[OURS].us
    return result


def verdicts(result: dict[str, Any]) -> str:
    lines = []
    for key, wanted in TARGETS.items():
        for case, value in result[key].items():
            verdict = "ok" if value >= wanted else "MISSED"
            lines.append(f"{key:<30}{case:<55}{value:>7.2f}  >= {wanted:<5}{verdict}")
    for case, value in result["snapshots_cost"].items():
        verdict = "ok" if value < SNAPSHOT_COST else "MISSED"
        lines.append(
            f"{'snapshots_cost':<30}{case:<55}{value:>7.1%}  <  {SNAPSHOT_COST:<5}{verdict}"
        )
    return "\n".join(lines)


def result_line(result: dict[str, Any]) -> str:
    return "RESULT " + json.dumps(_rounded(result))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
