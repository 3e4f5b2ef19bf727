"""What a reader asks of the index: SQL texts, their tables in ``driftgate.storage.index``."""

from __future__ import annotations

__all__ = [
    "CALLS",
    "CALL_SUMS",
    "COUNTS",
    "GROUP",
    "HAS_GAP",
    "IS_SCORED",
    "NOT_A_FLOOR",
    "PROMPT_KEY",
    "TRACES",
    "TRACE_SUMS",
    "TWINS",
    "WINDOW",
]

CALLS = (
    "SELECT call_id, trajectory, step, model, retry, "
    "COALESCE(status, CASE WHEN captured THEN 'done' ELSE 'open' END), "
    "intent, outcome, choices, captured, started_ns FROM calls "
)
TRACES = (
    "SELECT meta, prompt_len, response_len, has_routes, scorable, scored, twin_key, base, "
    "size_bytes, "
    "(SELECT status FROM calls c WHERE c.call_id = traces.call_id) FROM traces "
)
TWINS = (
    "SELECT first, second FROM (SELECT trace_id AS second, started_ns, LAG(trace_id) OVER "
    "(PARTITION BY twin_key, engine ORDER BY started_ns, trace_id) AS first FROM traces "
    "WHERE twin_key IS NOT NULL AND retry = 0 AND scorable) WHERE first IS NOT NULL"
)
NOT_A_FLOOR = (
    "AND NOT EXISTS (SELECT 1 FROM scores s WHERE s.trace_id = second AND s.kind = 'noise_floor')"
)
PROMPT_KEY = (
    "SELECT prompt_key, started_ns FROM traces "
    "WHERE trajectory = ? AND step = 0 AND prompt_key IS NOT NULL ORDER BY started_ns LIMIT 1"
)
WINDOW = (
    "SELECT (SELECT MIN(started_ns) FROM (SELECT started_ns FROM trajectories "
    "WHERE started_ns <= ?1 ORDER BY started_ns DESC LIMIT ?2)), "
    "(SELECT MAX(started_ns) FROM (SELECT started_ns FROM trajectories "
    "WHERE started_ns >= ?1 ORDER BY started_ns LIMIT ?2 + 1))"
)
# Of its first steps, the nearest before and after.
GROUP = (
    "SELECT * FROM (SELECT trajectory, MAX(started_ns) AS at FROM traces WHERE prompt_key = ?1 "
    "AND started_ns BETWEEN ?3 AND ?2 GROUP BY trajectory ORDER BY at DESC LIMIT ?5) UNION ALL "
    "SELECT * FROM (SELECT trajectory, MIN(started_ns) AS at FROM traces WHERE prompt_key = ?1 "
    "AND started_ns > ?2 AND started_ns <= ?4 GROUP BY trajectory ORDER BY at LIMIT ?5)"
)
HAS_GAP = "EXISTS (SELECT 1 FROM calls c WHERE c.trajectory = t.trajectory AND c.gap)"
IS_SCORED = (
    "NOT EXISTS (SELECT 1 FROM traces u "
    "WHERE u.trajectory = t.trajectory AND scorable AND NOT scored) "
    "AND EXISTS (SELECT 1 FROM traces u WHERE u.trajectory = t.trajectory AND scored)"
)
# A call without any trace misses one, unless it failed and its step was repeated.
CALL_SUMS = (
    "SELECT COUNT(DISTINCT step), "
    "COALESCE(SUM(CASE WHEN captured THEN MAX(choices - captured, 0) ELSE gap END), 0), "
    "COALESCE(SUM(captured = 0 AND status IS NULL), 0), COUNT(status), COALESCE(SUM(gap), 0) "
    "FROM calls WHERE trajectory = ?"
)
TRACE_SUMS = (
    "SELECT COUNT(*), COALESCE(SUM(scorable), 0), COALESCE(SUM(scorable AND scored), 0) "
    "FROM traces WHERE trajectory = ?"
)
COUNTS = (
    "SELECT (SELECT COUNT(*) FROM trajectories), "
    "(SELECT COUNT(*) FROM (SELECT DISTINCT trajectory, step FROM calls)), "
    "(SELECT COUNT(*) FROM calls), (SELECT COUNT(*) FROM traces), "
    f"(SELECT COUNT(*) FROM trajectories t WHERE NOT {HAS_GAP}), "
    "(SELECT COUNT(*) FROM traces WHERE scorable), "
    "(SELECT COUNT(*) FROM traces WHERE scorable AND scored), "
    "(SELECT COUNT(*) FROM scores)"
)
