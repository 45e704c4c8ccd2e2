from __future__ import annotations

from fastgen_jax.simulation.paper import SERVERS, SLOW_HOST, paper_runs, paper_table


def test_the_papers_table_compares_splitfuse_with_every_other_server() -> None:
    records = paper_runs(clients=(1, 16, 32), num_requests=40, workloads=[(2600, 128)])
    assert len(records) == 3 * len(SERVERS)
    assert [record.settings["policy"] for record in records[::3]] == ["splitfuse", "prompts_first", "orca", "prompts_first"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in paper_table(records) if line.startswith("| ")]
    p95 = {row[0]: row for row in rows if row[1].startswith("P95")}
    assert p95["prompts_first"][5] == "3.7", "the paper makes a claim about this figure"
    assert p95[SLOW_HOST][5] == "-", "the paper makes no claim about this server"
    # Whole prompts delay generation, whatever the host does.
    assert all(float(p95[name][4]) > 2 for name in SERVERS if name != "splitfuse")
    at = {row[0]: float(row[3].split("/")[0]) for row in rows if row[1].startswith("throughput at")}
    assert at[SLOW_HOST] < at["prompts_first"]
