"""The page of a world's claims holds those of tables and those that no table stands for."""

import json
from pathlib import Path

from mmdiff_cache.experiments.page import CLAIMS, OtherClaim, write_claims, write_page
from mmdiff_cache.experiments.report import RESULTS
from mmdiff_cache.experiments.statistics import Difference

GAIN, LOSS = Difference(estimate=0.2, low=0.1, high=0.3), Difference(estimate=-0.2, low=-0.3, high=-0.1)


def one_claim(*gains: Difference, runs: int = 1) -> OtherClaim:
    return OtherClaim(claim="maps > blob", task="words", metric="AP", differences=gains, runs=runs)


def test_other_claims_join_the_page_with_the_line_that_tests_them_again(tmp_path: Path) -> None:
    write_claims(tmp_path / "maps", "Maps", "python maps.py STORE", [one_claim(GAIN)])
    assert not (tmp_path / CLAIMS).exists(), "there is no world here"
    page = write_page(tmp_path)
    assert "1 confirmed." in page.read_text()
    write_claims(tmp_path / "more", "More", "python more.py", [one_claim(LOSS), one_claim(GAIN, runs=3)])
    text = page.read_text()
    assert "1 confirmed, 1 refuted, 1 open." in text
    assert "| maps > blob | words AP ↑ | - | +0.2000 [+0.1000, +0.3000] | **confirmed** |" in text
    assert "`python maps.py STORE`" in text
    kept = json.loads((tmp_path / "more" / RESULTS).read_text())["claims"]
    assert kept[1]["reason"] == "a verdict takes 3 seeds, there are 1"
