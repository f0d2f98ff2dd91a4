"""benchmarks.fastmoe: every lane on a CPU at tiny sizes, and a row that fails."""

from __future__ import annotations

import json

import pytest

from benchmarks import bench_fastmoe_lane, fastmoe


@pytest.mark.distributed
def test_every_lane(tmp_path, capsys):
    for package in ("matplotlib", "numpy", "tqdm"):  # of the GPT's training
        pytest.importorskip(package, reason="needs the extra `examples`")
    out = tmp_path / "out.json"
    assert fastmoe.main(["--device", "cpu", "--repeats", "10", "--json", str(out)]) == 0
    record, printed = json.loads(out.read_text()), capsys.readouterr().out
    for lane in fastmoe.LANES:
        assert record[lane]["paper"] in printed
    rows = {(row["num_experts"], row["key"]): row for row in record["single"]["rows"]}
    assert set(rows) == {(e, key) for e in (1, 2, 4) for key in ("loop", "moeops")}
    assert all(row["total"]["median"] > 0 for row in rows.values())
    measured = [(row["ranks"], row["label"]) for row in record["scaling"]["rows"]]
    assert measured == [(1, "one rank"), (2, "exact"), (2, "gather")]
    assert set(record["gpt"]["rows"]) == {"moe", "dense"}
    assert "a dense step is" in printed
    assert "at equal steps MoE is" in printed


def test_a_wrong_row_is_reported(tmp_path, capsys, monkeypatch):
    loop = bench_fastmoe_lane.loop_layer

    def wrong(x, parameters, top_k):
        y = loop(x, parameters, top_k)
        return y if x.dtype == bench_fastmoe_lane.reference_dtype(x.dtype, x.device) else 2 * y

    monkeypatch.setattr(bench_fastmoe_lane, "loop_layer", wrong)
    options = ["--device", "cpu", "--lanes", "single", "--repeats", "10"]
    assert fastmoe.main([*options, "--json", str(tmp_path / "out.json")]) == 1
    assert "FAILED E 4 loop: y: relative error 1.00e+00" in capsys.readouterr().err
